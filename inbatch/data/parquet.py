"""Parquet files as random-access records."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inbatch.data.lines import Content, Rows

_BATCH_ROWS = 1 << 13


class ParquetRows(Rows[dict[str, Any]]):
    """The rows of a Parquet file as {column: value}, of the columns that ``choose`` takes of the file's names.

    Parquet has no random access to single rows, only to row groups. So the columns are unpacked once into an Arrow file
    (see ``inbatch.data.index``), which is mapped.
    """

    def __init__(self, path: Path, choose: Callable[[Sequence[str]], list[str]]):
        self.path = path
        names = choose(parquet_names(path))
        content = Content(path, lambda file: _unpack(path, names, file), kind="rows", settings=names)
        reader = pa.ipc.open_file(pa.py_buffer(content.mapped()))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        super().__init__(int(self._starts[-1]), self._row, self._place, files=[path], nbytes=len(content))

    def _row(self, index: int) -> dict[str, Any]:
        return next(self.through(range(index, index + 1)))

    def _place(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def through(self, rows: range) -> Iterator[dict[str, Any]]:
        if rows.step != 1:
            yield from super().through(rows)
            return
        while rows:
            number = int(np.searchsorted(self._starts, rows.start, side="right")) - 1
            start, stop = self._starts[number : number + 2].tolist()
            length = min(stop - rows.start, len(rows))
            yield from self._batches[number].slice(rows.start - start, length).to_pylist()
            rows = rows[length:]


def parquet_names(path: Path) -> list[str]:
    """The top-level column names."""
    with _open(path) as file:
        return list(file.schema_arrow.names)


def _unpack(path: Path, names: list[str], target: IO[bytes]) -> None:
    with _open(path) as source:
        fields = [source.schema_arrow.field(name) for name in names]
        # An Arrow file takes one dictionary a column, Parquet one a row group.
        schema = pa.schema([f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in fields])
        try:
            with pa.ipc.new_file(target, schema) as sink:
                for batch in source.iter_batches(_BATCH_ROWS, columns=names):
                    sink.write_batch(batch.select(names).cast(schema))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole Parquet file: {error}") from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
