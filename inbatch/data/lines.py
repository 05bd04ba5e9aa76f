"""Random access to the records of a file without holding them: byte offsets in memory, the bytes mapped from disk."""

import gzip
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np

_SCAN_BYTES = 1 << 24


T = TypeVar("T")


class Rows(Sequence[T]):
    """A sequence whose items are made on access, by ``_read(index)`` for an index in ``range(len(self))``."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return self._read(places) if isinstance(places, int) else [self._read(place) for place in places]

    def _read(self, index: int) -> T:
        raise NotImplementedError


class Lines(Rows[Any]):
    """The JSON values of a file with one a line, parsed on access. Blank lines are no records.

    Costs 16 bytes of memory a record. A ``.gz`` file, which has no cheap random access, is unpacked once into an
    unnamed temporary file. ``where(i)`` names record i in messages.
    """

    def __init__(self, path: str | os.PathLike, *, spool: IO[bytes] | None = None, unit: str = "line"):
        self.path = Path(path)
        self._unit = unit
        with spool or _open(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            # An empty file cannot be mapped. The mapping outlives the file object, and an unnamed file lives with it.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self._starts, self._stops = _line_bounds(self._bytes)

    def __len__(self) -> int:
        return len(self._starts)

    def _read(self, index: int) -> Any:
        line = self._bytes[self._starts[index] : self._stops[index]]
        try:
            value = json.loads(line.decode("utf-8-sig"))
            if b"\\ud" in line.lower():  # half a surrogate pair passes as JSON, and no tokenizer takes it
                json.dumps(value, ensure_ascii=False).encode()
            return value
        except ValueError as error:
            shown = line[:60].decode("utf-8", "replace")
            raise ValueError(
                f"{self.where(index)} is not JSON ({error}): {shown!r}. Expected one JSON object a line, in UTF-8."
            ) from None

    def whole(self) -> Any:
        """The JSON value that the file is when read as one."""
        try:
            return json.loads(self._bytes[:])
        except ValueError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from None

    def where(self, index: int) -> str:
        """The place of record ``index``, as in "data/train.jsonl, line 3" (lines count from 1)."""
        index = range(len(self))[index]
        before = self._bytes[: self._starts[index]].count(b"\n") if self._unit == "line" else index
        return f"{self.path}, {self._unit} {before + 1}"


def spooled(path: str | os.PathLike, values: Iterable[Any], *, unit: str) -> Lines:
    """``Lines`` over values unpacked from another kind of file into an unnamed temporary file."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - Lines closes it once mapped
    for number, value in enumerate(values, 1):
        try:
            spool.write(json.dumps(value).encode() + b"\n")
        except TypeError as error:
            raise ValueError(f"{path}, {unit} {number}: expected texts, numbers and lists of them; {error}") from None
    spool.flush()
    return Lines(path, spool=spool, unit=unit)


def find_file(folder: Path, name: str) -> Path | None:
    """``folder/name`` or ``folder/name.gz``, whichever exists; None if neither does."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def open_text(path: Path) -> IO[str]:
    """A UTF-8 text file, gzipped if its name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    # A byte that is no UTF-8 becomes a sign that no id holds, and so is reported with its line.
    return opener(path, "rt", encoding="utf-8-sig", errors="replace")  # type: ignore[return-value]


def _open(path: Path) -> IO[bytes]:
    if path.suffix != ".gz":
        return open(path, "rb")
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, spool)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    spool.flush()
    return spool


def _line_bounds(data: mmap.mmap | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Start and stop of every line that is not blank, int64."""
    size = len(data)
    ends = [np.empty(0, np.int64)]
    for start in range(0, size, _SCAN_BYTES):
        chunk = np.frombuffer(data[start : start + _SCAN_BYTES], np.uint8)
        ends.append(np.flatnonzero(chunk == ord("\n")) + start)
    stops = np.concatenate(ends)
    if size and (not len(stops) or stops[-1] != size - 1):
        stops = np.append(stops, size)
    starts = np.concatenate([np.zeros(min(1, len(stops)), np.int64), stops[:-1] + 1])
    # Short lines are the only ones that can be blank, so only they are looked at one by one.
    keep = stops > starts
    for i in np.flatnonzero((stops - starts <= 8) & keep):
        keep[i] = bool(data[starts[i] : stops[i]].strip())
    return starts[keep], stops[keep]
