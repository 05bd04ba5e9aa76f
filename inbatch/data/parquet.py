"""Parquet files as random-access records."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from inbatch.data.columns import one_line
from inbatch.data.lines import Content, Rows

_BATCH_ROWS = 1 << 13


class ParquetRows(Rows[dict[str, Any]]):
    """The rows of a Parquet file as {column: value}, of the columns that ``choose`` takes of the file's names.

    Parquet has no random access to single rows, only to row groups. So the columns are unpacked once into an Arrow file
    (see ``inbatch.data.index``), which is mapped.
    """

    def __init__(self, path: Path, choose: Callable[[Sequence[str]], list[str]]):
        self.path = path
        with _open(path) as file:
            names = choose(file.schema_arrow.names)
        content = Content(path, lambda file: _unpack(path, names, file), kind="rows", settings=names)
        self._table = pa.ipc.open_file(pa.py_buffer(content.mapped())).read_all()
        super().__init__(len(self._table), self._row, self._place, files=[path], nbytes=len(content))

    def _row(self, index: int) -> dict[str, Any]:
        return self._values(index, 1)[0]

    def _place(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def through(self, rows: range) -> Iterator[dict[str, Any]]:
        for first in rows[::_BATCH_ROWS]:
            yield from self._values(first, min(_BATCH_ROWS, rows.stop - first))

    def _values(self, first: int, count: int) -> list[dict[str, Any]]:
        try:
            return self._table.slice(first, count).to_pylist()
        except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a date beyond Python's
            if count > 1:
                return [self._row(row) for row in range(first, first + count)]
            raise ValueError(f"{self.where(first)} holds what cannot be read: {one_line(error)}") from None


def _unpack(path: Path, names: list[str], target: IO[bytes]) -> None:
    with _open(path) as source:
        fields = [source.schema_arrow.field(name) for name in names]
        # An Arrow file takes one dictionary a column, Parquet one a row group.
        schema = pa.schema([f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in fields])
        with pa.ipc.new_file(target, schema) as sink:
            for batch in _batches(path, source, names, schema):
                sink.write_batch(batch)


def _batches(path: Path, source: pq.ParquetFile, names: list[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    try:
        for batch in source.iter_batches(_BATCH_ROWS, columns=names):
            batch = batch.select(names).cast(schema)
            batch.validate(full=True)  # a damaged offset would be read outside the file
            yield batch
    except (pa.ArrowException, OSError, MemoryError) as error:  # MemoryError: of an absurd size
        raise ValueError(f"{path} is not a whole Parquet file: {one_line(error)}") from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, UnicodeDecodeError, OSError, MemoryError) as error:  # Unicode: pyarrow 17
        raise ValueError(f"{path} is not a Parquet file: {one_line(error)}") from None
