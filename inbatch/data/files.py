"""Files and folders that are either whole or absent, whatever happens while they are written.

A file or folder is filled under a hidden name beside it (`.NAME.partial`), forced to disk and renamed. An interrupted
write leaves the hidden name behind, which the next write of the same file or folder replaces.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the hidden path to create a file or folder at; afterwards it becomes `path`, whole and on disk.

    Makes the folder above. After an exception the hidden path is removed and what `path` held before stays. An error of
    the file system, whichever library met it, is an OSError that names `path`.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial(path))
        try:
            yield partial(path)
            publish(path)
        except BaseException:
            remove(partial(path))
            raise


def partial(path: Path) -> Path:
    """Return the hidden path beside `path` under which it is filled."""
    return path.with_name(f".{path.name}.partial")


def claimed(path: Path) -> IO[bytes]:
    """Open `partial(path)` to append, and keep other processes out of it until the file is closed, or published.

    Raises ValueError while another process holds it.
    """
    file, taken = partial(path).open("ab"), False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not os.path.samestat(os.fstat(file.fileno()), partial(path).stat())
    except (BlockingIOError, FileNotFoundError):  # the other has it, or published it in this moment
        taken = True
    except OSError:
        pass  # a file system without locks
    if taken:
        file.close()
        raise ValueError(f"{path} is being written by another run: wait for its end, or name another file")
    return file


def publish(path: Path) -> None:
    """Force the file or folder at `partial(path)` to disk and give it the name `path`, instead of what had it."""
    filled = partial(path)
    for part in [*sorted(filled.rglob("*")), filled]:
        sync(part)
    if path.is_dir() and filled.is_dir():  # which a rename does not replace, unless the old one is empty
        _set_aside(path)
    filled.replace(path)
    sync(path.parent)
    remove(_aside(path))  # also what a process left that was killed in between


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there. A folder disappears at once, before its files do."""
    if path.is_dir() and not path.is_symlink():
        if path.name.startswith("."):
            shutil.rmtree(path, ignore_errors=True)
        else:
            _set_aside(path)
            remove(_aside(path))
    else:
        path.unlink(missing_ok=True)


def _set_aside(path: Path) -> None:
    remove(_aside(path))
    path.rename(_aside(path))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def sync(path: str | os.PathLike) -> None:
    """Force a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turn errors of the file system that name no path into OSErrors that name this one.

    A write to a full disk names none. Libraries in Rust (safetensors, tokenizers) raise other classes, whose text ends
    like "No space left on device (os error 28)".
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def check_output(path: str | os.PathLike, sources: Iterable[Path] = ()) -> None:
    """Make the folder of a file that is to be written after long work.

    Raises ValueError if no file of this name can be written, or if it is one of `sources`, which are being read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} cannot be written, since it is not a file: name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; name a file in another folder") from None
    if path.exists() and any(source.exists() and path.samefile(source) for source in sources):
        raise ValueError(f"{path} is read as the source, and would be replaced: name another file")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as filled:
        filled.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Replace a small JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")
