"""Random access to the records of a file: an index of their places is mapped, and the bytes stay on disk."""

import gzip
import json
import mmap
import os
import shutil
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np

from inbatch.data.index import HEADER, Arrays, arrays_made_once, made_once, spread

_BLOCK_BYTES = 1 << 22
_BLOCK_ROWS = 1 << 13
_SCAN_BYTES = 1 << 18
_LONG = 9  # bytes: shorter lines may be blank
_BLANK = b" \t\r\v\f\xef\xbb\xbf"  # white space, and a byte-order mark

T = TypeVar("T")
Where = Callable[[], str]
Visit = Callable[[Iterator[tuple[Any, Where]]], Arrays]


class Rows(Sequence[T], Generic[T]):
    """A sequence of `count` items that are made on access, by `read(index)`; `where(index)` names one in messages.

    files: the sources, if all are files. nbytes: about the bytes that reading all items reads.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[int], T],
        where: Callable[[int], str],
        *,
        files: Sequence[Path] = (),
        nbytes: int = 0,
    ):
        self._count, self._read, self.where = count, read, where
        self.files, self.nbytes = files, nbytes

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(self._count)[index]
        if isinstance(places, int):
            return self._read(places)
        return list(self.through(places) if places.step == 1 else map(self._read, places))

    def __iter__(self) -> Iterator[T]:
        return iter(self.through(range(self._count)))

    def through(self, rows: range) -> Iterator[T]:
        """Yield the items of consecutive rows."""
        return map(self._read, rows)


def chosen(items: Sequence[T], rows: Sequence[int] | np.ndarray) -> Rows[T]:
    """Return some of the items, which may stay on disk, by their rows."""
    where = items.where if isinstance(items, Rows) else "item {}".format
    files = items.files if isinstance(items, Rows) else ()
    return Rows(len(rows), lambda index: items[int(rows[index])], lambda index: where(int(rows[index])), files=files)


def joined(parts: Sequence[Rows[T]]) -> Rows[T]:
    """Return several sequences as one, in order."""
    return parts[0] if len(parts) == 1 else _Joined(parts)


class _Joined(Rows[T]):
    def __init__(self, parts: Sequence[Rows[T]]):
        self._parts, self._starts = parts, np.cumsum([0] + [len(part) for part in parts])
        # Without the files of every part nothing tells whether the whole has changed.
        files = [file for part in parts for file in part.files] if all(part.files for part in parts) else []
        nbytes = sum(part.nbytes for part in parts)
        super().__init__(int(self._starts[-1]), self._item, self._place, files=files, nbytes=nbytes)

    def _part(self, index: int) -> tuple[Rows[T], int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part], index - int(self._starts[part])

    def _item(self, index: int) -> T:
        part, row = self._part(index)
        return part[row]

    def _place(self, index: int) -> str:
        part, row = self._part(index)
        return part.where(row)

    def through(self, rows: range) -> Iterator[T]:
        while rows:
            part, row = self._part(rows.start)
            stop = min(len(part), row + len(rows))
            yield from part.through(range(row, stop))
            rows = rows[stop - row :]


def scanned(
    rows: Rows,
    kind: str,
    settings: object,
    visit: Visit,
    *,
    finish: Callable[[Arrays], Arrays] = dict,
    also: Sequence[Path] | None = (),
) -> Arrays:
    """Return the result of one pass over all rows: `finish` of the arrays that `visit` makes of parts, joined.

    visit: gets (item, its `where`) of consecutive rows, in one of several processes; raises ValueError for a broken
    item. The result is kept (see `inbatch.data.index`) while the rows' files, the other files read (`also`; None: not
    all are files, and nothing is kept) and `settings` stay the same.
    """

    def visit_some(some: range) -> Arrays:
        return visit(zip(rows.through(some), map(partial(partial, rows.where), some), strict=True))

    def make() -> Arrays:
        parts = [dict(part) for part in spread(visit_some, len(rows), rows.nbytes)]
        # Parts are let go as they are joined, so that no two copies of all are held.
        return finish({name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])})

    files = [*rows.files, *also] if rows.files and also is not None else []
    return arrays_made_once(files, kind, settings, make)


class Content:
    """The bytes of a file, unpacked if its name ends in .gz; or the output of `unpack`, if given.

    `content[a:b]` reads them, and `mapped()` maps them for a pass over all. Unpacked bytes are kept, see
    `inbatch.data.index`.
    """

    def __init__(
        self, path: Path, unpack: Callable[[IO[bytes]], None] | None = None, *, kind: str = "unpacked", settings=None
    ):
        self.path = path
        if unpack is None and path.suffix == ".gz":
            unpack = partial(_gunzip, path)
        self._file = path.open("rb") if unpack is None else made_once([path], kind, settings, unpack)
        weakref.finalize(self, self._file.close)
        self._first = 0 if unpack is None else HEADER
        self._size = max(0, os.fstat(self._file.fileno()).st_size - self._first)  # 0: nothing was unpacked

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> bytes:
        start, stop, _ = where.indices(self._size)
        # Read, not mapped: a mapping counts as memory, and ends the process by a signal where the file became shorter.
        data = os.pread(self._file.fileno(), max(0, stop - start), self._first + start)
        if len(data) < stop - start:
            raise ValueError(f"{self.path} became shorter while it was in use: bring it back and start again")
        return data

    def mapped(self) -> memoryview:
        """Return a view of all bytes, for what searches them; pages that are read count as this process's memory."""
        if not self._size:  # which cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))[self._first :]

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from start to stop, some megabytes at a time."""
        for place in range(start, stop, _BLOCK_BYTES):
            yield self[place : min(stop, place + _BLOCK_BYTES)]


def _gunzip(path: Path, file: IO[bytes]) -> None:
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def json_value(line: bytes) -> Any:
    """Parse one JSON value; ValueError for bad JSON, and for a repeated key, of which json would keep the last."""
    try:
        text = line.decode().removeprefix("\ufeff")
        value = _DECODER.decode(text)
        _require_utf8(value, text, 0, len(text))
        return value
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode("utf-8", "replace")
        raise ValueError(f"is not JSON ({error}): {shown!r}. Expected one JSON object a line, in UTF-8.") from None


def _require_utf8(value: Any, text: str, start: int, stop: int) -> None:
    """Raise ValueError for half a surrogate pair in text[start:stop]: it passes as JSON, and no tokenizer takes it."""
    if text.find("\\ud", start, stop) >= 0 or text.find("\\uD", start, stop) >= 0:
        json.dumps(value, ensure_ascii=False).encode()


def _json_lines(block: bytes) -> Iterator[Any]:
    """Yield the value of one line after the other as `json_value` does, in half the time, up to an unusual line.

    Such a line may be wrong, or blank, or begin with white space: the caller goes on from there line by line.
    """
    try:
        text = block.decode()
        start, end, surrogates = 0, len(text), "\\ud" in text or "\\uD" in text
        while start < end:
            stop = text.find("\n", start)
            stop = end if stop < 0 else stop
            value, after = _scan_json(text, start)
            if after != stop and (after > stop or text[after:stop].strip()):
                return
            if surrogates:
                _require_utf8(value, text, start, stop)
            yield value
            start = stop + 1
    except (StopIteration, ValueError, RecursionError):
        return


def _distinct(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(members)) == len(members):
        return value
    names = [name for name, _ in members]
    raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)
_scan_json: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # pyright: ignore


def text_value(line: bytes) -> str:
    """Decode one line of plain text."""
    try:
        return line.decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error}): save the file in that encoding") from None


class Lines(Rows[Any]):
    """The records of a file, a line each unless `bounds` says otherwise, parsed on access. Blank lines are no records.

    bounds: `stops` of the records and, unless each begins behind the one before it, `starts`. skip: the number of
    lines at the top that hold no record. A ValueError of `parse(bytes)` is raised again with the record's place.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        parse: Callable[[bytes], Any] = json_value,
        *,
        content: Content | None = None,
        bounds: Arrays | None = None,
        unit: str = "line",
        skip: int = 0,
    ):
        self.path, self._parse, self._unit = Path(path), parse, unit
        self.content = content or Content(self.path)
        bounds = bounds or arrays_made_once([self.path], "lines", None, lambda: {"stops": line_stops(self.content)})
        self._quick = parse is json_value and "starts" not in bounds
        # As memoryviews, of which single elements are found fastest.
        self._starts = bounds["starts"].data if "starts" in bounds else None
        self.stops = bounds["stops"].data[skip:]
        self._zero = bounds["stops"].data[skip - 1] + 1 if skip else 0
        super().__init__(len(self.stops), self._line, self._place, files=[self.path], nbytes=len(self.content))

    def _start(self, index: int) -> int:
        """Return where the record begins, or the blank lines before it."""
        if self._starts is not None:
            return self._starts[index]
        return self.stops[index - 1] + 1 if index else self._zero

    def _line(self, index: int) -> Any:
        return self._value(self.content[self._start(index) : self.stops[index]], index)

    def _value(self, line: bytes, index: int) -> Any:
        try:
            return self._parse(line[_blank_lines(line) :])
        except ValueError as error:
            raise ValueError(f"{self.where(index)} {error}") from None

    def through(self, rows: range) -> Iterator[Any]:
        first = rows.start
        while first < rows.stop:
            zero = self._start(first)
            most = min(first + _BLOCK_ROWS, rows.stop)
            last = max(first + 1, bisect_right(self.stops, zero + _BLOCK_BYTES, first, most))
            block = self.content[zero : self.stops[last - 1]]
            for value in _json_lines(block) if self._quick else ():
                yield value
                first += 1
            stops = self.stops[first:last].tolist()
            starts = [self._start(first), *(stop + 1 for stop in stops)] if first < last else []
            if self._starts is not None:
                starts = self._starts[first:last].tolist()
            for row, start, stop in zip(range(first, last), starts, stops, strict=False):
                yield self._value(block[start - zero : stop - zero], row)
            first = last

    def _place(self, index: int) -> str:
        """Return the place of record `index`, as in "data/train.jsonl, line 3" (lines count from 1)."""
        index = range(len(self))[index]
        before = index
        if self._unit == "line":
            start, stop = self._start(index), self.stops[index]
            start += _blank_lines(self.content[start:stop])
            before = sum(block.count(b"\n") for block in self.content.blocks(0, start))
        return f"{self.path}, {self._unit} {before + 1}"


def _blank_lines(data: bytes) -> int:
    """Return the place of the first line that is not blank."""
    start = 0
    while (stop := data.find(b"\n", start)) >= 0 and not data[start:stop].strip(_BLANK):
        start = stop + 1
    return start


def line_stops(content: Content) -> np.ndarray:
    """Return the ends of the lines that are not blank, of `places_dtype`."""
    dtype = places_dtype(len(content))

    def scan(numbers: range) -> np.ndarray:
        span = content.blocks(numbers.start * _SCAN_BYTES, min(len(content), numbers.stop * _SCAN_BYTES))
        found = np.empty(1 + sum(block.count(b"\n") for block in span), dtype)
        count = 0
        for number in numbers:
            zero = number * _SCAN_BYTES
            before = min(zero, _LONG)
            block = content[zero - before : zero + _SCAN_BYTES]
            stops = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            if zero + _SCAN_BYTES >= len(content) and not block.endswith(b"\n"):
                stops = np.append(stops, len(block))
            starts = np.append(0, stops[:-1] + 1)[: len(stops)]
            kept = (stops > starts) & (stops >= before)
            # Only short lines are tested, one by one: longer ones count as filled.
            for i in np.flatnonzero(kept & (stops - starts < _LONG)):
                kept[i] = bool(block[starts[i] : stops[i]].strip(_BLANK))
            stops = stops[kept]
            found[count : count + len(stops)] = stops + (zero - before)
            count += len(stops)
        return found[:count]

    parts = spread(scan, -(-len(content) // _SCAN_BYTES), len(content))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def places_dtype(size: int) -> np.dtype:
    """Return the dtype of places in so many bytes, in half the memory where they are below 4 GiB."""
    return np.dtype(np.uint32 if size < 1 << 32 else np.int64)
