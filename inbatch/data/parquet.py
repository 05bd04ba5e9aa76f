"""Parquet files as random-access records."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inbatch.data.lines import Lines, spooled

_BATCH_ROWS = 1024


def parquet_names(path: Path) -> list[str]:
    """The top-level column names."""
    with _open(path) as file:
        return list(file.schema_arrow.names)


def parquet_lines(path: Path, choose: Callable[[Sequence[str]], list[str]]) -> Lines:
    """``Lines`` over the columns that ``choose`` takes of the file's names.

    The rows are unpacked once into a temporary file: a Parquet row group has to be decoded whole, so shuffled access
    to single rows would decode the entire file for every batch.
    """

    def rows() -> Iterator[dict[str, Any]]:
        with _open(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=choose(file.schema_arrow.names)):
                yield from batch.to_pylist()

    return spooled(path, rows(), unit="row")


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
