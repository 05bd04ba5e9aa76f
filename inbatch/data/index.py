"""Results over whole data files: computed once, by one process, and kept for every rank and later run.

They are kept in the folder `.inbatch` beside the data, or below the user's cache if that cannot be written;
INBATCH_CACHE names another folder for all. A kept file counts only while size, time and ends of the data files, the
code that made it and its checksum are the same. Data of a few megabytes are read again instead.
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from inbatch.data.plan import share

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
HEADER = 4096  # what is kept begins here, behind a line of JSON
_SMALL = 8 << 20  # bytes of data that are faster read again than found
_PART_BYTES = 8 << 20  # for one process at a time
_MIB = 1 << 20
_task: Callable[[range], Any]


# ---- files made once


def made_once(files: Sequence[Path], kind: str, settings: object, make: Callable[[IO[bytes]], None]) -> IO[bytes]:
    """Return a file open for reading, with the output of `make(file)` for `files` from byte HEADER on.

    kind, settings: the content depends on them too. Other processes wait for the first, then map its file. A ValueError
    of `make` is kept too, and raised again while the files stay the same. An unnamed temporary file takes the place if
    there are no `files`, if they are small, or if nothing can be written.
    """
    if not files or sum(file.stat().st_size for file in files) < _SMALL:
        return _unnamed(make)
    made_of = _identity(files, settings)
    paths = places(files, kind, settings)
    for path in paths:
        if kept := _open_kept(path, made_of):
            return kept
    path = next((path for path in paths if writable(path.parent)), None)
    if path is None:
        return _unnamed(make)
    with _alone(path, files[0]):
        if kept := _open_kept(path, made_of):  # made while this process waited
            return kept
        try:
            _make(path, files[0], made_of, make)
        except OSError as error:
            print(f"{path} cannot be kept ({error.strerror}): {files[0]} is read at every start", file=sys.stderr)
            return _unnamed(make)
        if _identity(files, settings) != made_of:
            path.unlink()
            raise ValueError(f"{files[0]} changed while it was read: start again when it is complete")
        kept = _open_kept(path, made_of)
        assert kept is not None, f"{path} was made and cannot be read"
        return kept


def arrays_made_once(files: Sequence[Path], kind: str, settings: object, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `make()` computes over `files`, mapped from a file that `made_once` keeps."""

    def write(file: IO[bytes]) -> None:
        arrays = make()
        for array in (np.array(list(arrays)), *arrays.values()):
            _align(file)
            np.save(file, array)

    with made_once(files, kind, settings, write) as file:
        file.seek(HEADER)
        return {name: _mapped(file) for name in np.load(file)}


def _align(file: IO[bytes]) -> None:
    """Move to where an array may begin: numpy copies the whole of one that is not aligned for each search in it."""
    file.seek(-(-file.tell() // 64) * 64)


def _mapped(file: IO[bytes]) -> np.ndarray:
    """Return the array that np.save wrote at the file's position, which moves behind it."""
    _align(file)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    array = np.memmap(file, dtype, "r", start, shape) if np.prod(shape) else np.empty(shape, dtype)
    file.seek(start + array.nbytes)
    return np.asarray(array)  # whose elements are found faster than a memmap's


def _make(path: Path, data: Path, made_of: str, make: Callable[[IO[bytes]], None]) -> None:
    header: dict[str, Any] = {"made_of": made_of}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        try:
            file.seek(HEADER)
            try:
                make(file)
            except ValueError as error:
                header["error"] = str(error)[:1000]
                file.truncate(HEADER)
            file.flush()
            header["size"] = os.fstat(file.fileno()).st_size
            header["checksum"] = _checksum(file, header["size"])
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER))
            file.flush()
            shutil.copymode(data, file.name)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _open_kept(path: Path, made_of: str) -> IO[bytes] | None:
    """Return the file at `path` if it is whole and up to date; raise the error that it holds."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    try:
        header = json.loads(file.read(HEADER))
    except ValueError:
        header = {}
    size = os.fstat(file.fileno()).st_size
    up_to_date = header.get("made_of") == made_of and header.get("size") == size
    if not up_to_date or header.get("checksum") != _checksum(file, size):
        file.close()
        return None
    if "error" in header:
        raise ValueError(header["error"])
    return file


def _unnamed(make: Callable[[IO[bytes]], None]) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller reads it
    try:
        file.seek(HEADER)
        make(file)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _checksum(file: IO[bytes], size: int) -> int:
    """Return a checksum over the content or, beyond half a GiB, over 512 MiB spread evenly."""
    total = 0
    for start in range(HEADER, size, max(_MIB, (size - HEADER) // 512)):
        total = zlib.crc32(os.pread(file.fileno(), _MIB, start), total)
    return total


# ---- identity and place of a kept file


def _identity(files: Sequence[Path], settings: object) -> str:
    """Return a digest of the files' sizes, times and ends, of the settings, and of the code that reads them."""
    digest = hashlib.blake2b(_code() + repr(settings).encode(), digest_size=16)
    for path in files:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            ends = (os.pread(file.fileno(), 1 << 16, start) for start in (0, max(0, state.st_size - (1 << 16))))
            digest.update(f"{state.st_size} {state.st_mtime_ns} ".encode() + b"".join(ends))
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _code() -> bytes:
    """Return a digest of the sources that read records: another version reads everything anew."""
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "ids.py"]
    return hashlib.blake2b(b"".join(source.read_bytes() for source in sources)).digest()


def places(files: Sequence[Path], kind: str, settings: object) -> list[Path]:
    """Return the paths at which a result over `files` may be kept, the preferred first."""
    if given := os.environ.get("INBATCH_CACHE"):
        if not writable(Path(given)):
            raise ValueError(f"INBATCH_CACHE is {given!r}, which is not a writable folder: name another")
        return [Path(given) / _name(files, Path("/"), kind, settings)]
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Beside the data, the name depends on relative places, so that a folder that is moved keeps its index.
    beside = files[0].parent
    paths = [beside / ".inbatch" / _name(files, beside, kind, settings)]
    if os.path.isabs(user):
        paths.append(Path(user) / "inbatch" / _name(files, Path("/"), kind, settings))
    return paths


def _name(files: Sequence[Path], home: Path, kind: str, settings: object) -> str:
    names = [os.path.relpath(file.resolve(), home.resolve()) for file in files]
    digest = hashlib.blake2b(repr((names, kind, settings)).encode(), digest_size=8).hexdigest()
    return f"{files[0].name}.{kind}-{digest}"


def writable(folder: Path) -> bool:
    """Return True if files can be made in a folder, which is created if needed.

    False if its mode bits let nobody write: it is meant to stay unchanged, although root could write.
    """
    present = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not present.stat().st_mode & 0o222:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    if not os.access(folder, os.W_OK):
        return False
    if folder.name == ".inbatch" and not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")
    return True


@contextmanager
def _alone(path: Path, data: Path) -> Iterator[None]:
    """Hold the lock of a kept file; the kernel frees it when the process ends, in whatever way."""
    with path.with_name(f"{path.name}.lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks: each process makes the file, and the last one's stays.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                if os.environ.get("RANK", "0") == "0":
                    print(f"{data} is being read by another process: waiting for its index", file=sys.stderr)
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# ---- one pass in several processes


def spread(task: Callable[[range], T], count: int, nbytes: int) -> list[T]:
    """Return `task(rows)` for ranges that follow one another through range(count), by a process for each core.

    nbytes: the size of the rows, which decides how many ranges there are. The first error in row order is raised.
    """
    cores = len(os.sched_getaffinity(0))
    parts = max(1, min(count, nbytes // _PART_BYTES))
    ranges = [share(count, part, parts) for part in range(parts)]
    if cores == 1 or len(ranges) == 1 or multiprocessing.current_process().daemon:
        return [task(rows) for rows in ranges]
    # Forked, so that the task need not be pickled.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(cores, len(ranges), 32), context, _hold, (task,)) as executor:
        try:
            return list(executor.map(_run, ranges))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def _hold(task: Callable[[range], Any]) -> None:
    global _task
    _task = task


def _run(rows: range) -> Any:
    return _task(rows)
