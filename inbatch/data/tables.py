"""Records from files of any kind: JSONL, JSON, Parquet, CSV, TSV, folders and globs of these, `datasets`, sequences."""

import csv
import glob
import os
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from inbatch.data.columns import Columns, listed, not_read, notice, one_line, show
from inbatch.data.index import Arrays, arrays_made_once
from inbatch.data.json_spans import JsonText
from inbatch.data.lines import Lines, Rows, joined, json_value, places_dtype, text_value

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
KINDS = "*.jsonl, *.json, *.csv, *.tsv (each also .gz), *.parquet, a folder or a glob of these"
BY_ID = "{corpus: [{path}], data: [{question_id, question, corpus_id, pos_doc: [{id}], neg_doc: [{id}]}]}"
# JSON files that describe a folder, and hold no records.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "merlin_metadata.json"}
_SPLIT = re.compile(r"(?:^|[-._])(train|dev|development|valid|validation|val|test|eval)(?=[-._]|$)", re.IGNORECASE)
_SAME_SPLIT = {"development": "dev", "valid": "dev", "validation": "dev", "val": "dev", "eval": "dev"}

_LIST = re.compile(r"""\[\s*(["']).*\1\s*\]""", re.DOTALL)  # as Python and JSON write it
_MOST_COLUMNS = 10_000
# The csv module's limit of 128 KiB a cell cuts real documents. A larger cell than this is a quote that is not closed.
csv.field_size_limit(1 << 22)


def open_table(source: Any, columns: Columns, split: str | None = "train", without: Sequence[Path] = ()) -> Rows[Any]:
    """Return the records of a source; of several files, one after the other.

    source: a path, a glob, or a sequence of mappings such as a `datasets.Dataset`. split: which files of a folder are
    read if their names or folders say one (train-00000-of-00002.parquet); None is train, or the only one there is.
    columns: which columns of a file with a header are wanted. without: files of a folder to leave out.

    Raises ValueError, naming file and place, for what does not exist, has no known kind, is empty or cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return _sequence(source, columns, split, name_of(source))
    path = Path(source)
    if is_datasets_folder(path):
        return _sequence(_load_from_disk(path), columns, split, str(path))
    rows = joined([open_file(file, columns) for file in find_files(path, split, without)])
    if not len(rows):
        raise ValueError(f"{source} is empty: expected one record a line")
    return rows


def open_file(path: Path, columns: Columns) -> Rows[Any]:
    """Return the records of one file, by the ending of its name."""
    kind = suffix(path)
    if kind in (".jsonl", ".ndjson"):
        return Lines(path)
    if kind == ".parquet":
        from inbatch.data.parquet import ParquetRows  # JSON and CSV need no pyarrow

        return ParquetRows(path, lambda names: columns.wanted(names, str(path)))
    if kind in (".csv", ".tsv"):
        return _delimited(path, columns)
    if kind == ".json":
        rows, corpora = open_json(path)
        if corpora is not None:
            raise ValueError(f"{path} names corpora: give it as a separate source, not in a folder or glob")
        return rows
    raise ValueError(f"{path} is of no known kind: expected {KINDS}")


def suffix(path: Path) -> str:
    """Return the ending of a file's name, before .gz, in lower case."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


# ---------------------------------------------------------------------------------------------------- folders and globs


def find_part(folder: Path, *stems: str) -> Path | None:
    """Return the first file or folder of these stems: for corpus, corpus.jsonl.gz or corpus/."""
    for stem in stems:
        for name in (stem + ending + packed for ending in SUFFIXES for packed in ("", ".gz")):
            if (folder / name).is_file():
                return folder / name
        if (folder / stem).is_dir():
            return folder / stem
    return None


def has_split(folder: Path, split: str) -> bool:
    """Return True for a folder of which some file is named by the split."""
    return any(_split_of(Path(file.name)) == _SAME_SPLIT.get(split, split) for file in folder.iterdir())


def name_of(source: Any) -> str:
    """Return the name of a source for messages."""
    return str(source) if isinstance(source, (str, os.PathLike)) else f"the given {type(source).__name__}"


def find_files(path: Path, split: str | None = "train", without: Sequence[Path] = ()) -> list[Path]:
    """Return the files of a path: itself, what a glob matches, or a folder's files of one split."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _shards(path, split, without)
    files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    if not files:
        problem = "matches no file" if glob.has_magic(str(path)) else "does not exist"
        raise ValueError(f"{path} {problem}: expected {KINDS}")
    return files


def _shards(folder: Path, split: str | None, without: Sequence[Path]) -> list[Path]:
    files = {
        file: _split_of(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if suffix(file) in SUFFIXES and file.name not in _DESCRIPTIONS and file.is_file()
        if not any(path in without for path in (file, *file.parents))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }
    if not files:
        raise ValueError(f"{folder} holds no data: expected {KINDS}, found {listing(folder)}")
    splits = sorted({name for name in files.values() if name})
    wanted = _SAME_SPLIT.get(split, split) if split else splits[0] if len(splits) == 1 else "train"
    if wanted not in splits if splits else wanted != "train":
        raise ValueError(f"{folder} has no split {wanted!r}: it has {splits or [file.name for file in files][:20]}")
    taken = [file for file, name in files.items() if name == wanted or not splits]
    places = sorted({str(file.parent) for file in taken})
    if len(places) > 1:
        raise ValueError(
            f"{folder} holds several sets, in {places[:20]}: name one of them, or all by a glob such as "
            f"{str(folder / '**' / ('*' + suffix(taken[0])))!r}"
        )
    # Files of other splits need no mention. A corpus has no splits, so all its files that are not read do.
    rest = [file for file, name in files.items() if file not in taken and (name is None or split is None)]
    not_read(str(folder), [str(file.relative_to(folder)) for file in rest])
    numbered = filter(None, (re.match(r"(.+-)[0-9]+(-of-([0-9]+)\..+)", file.name) for file in taken))
    for (before, after, total), count in Counter(match.groups() for match in numbered).items():
        if count < int(total):
            notice(f"{folder}: of {int(total)} files {before}*{after} {count} are there, and read")
    return taken


def _split_of(path: Path) -> str | None:
    """Return the split in a file's name, or else in that of the nearest folder above."""
    for part in reversed(path.parts):
        if match := _SPLIT.search(part):
            return _SAME_SPLIT.get(match[1].lower(), match[1].lower())
    return None


def listing(folder: Path) -> list[str]:
    """Return the names in a folder, for messages."""
    return sorted(entry.name for entry in folder.iterdir())[:20]


# ----------------------------------------------------------------------------------------------------- Python's objects


def is_datasets_folder(path: Path) -> bool:
    """Return True for a folder that save_to_disk of `datasets` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_from_disk(path: Path) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"{path} was saved by `datasets`, which is not installed: pip install datasets") from None
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # of any class, from JSON to Arrow
        raise ValueError(f"{path} cannot be read by datasets.load_from_disk: {one_line(error)}") from None


def _sequence(source: Any, columns: Columns, split: str | None, name: str) -> Rows[Any]:
    """Return the records of a sequence of mappings, or of one split of a mapping of such sequences."""
    if isinstance(source, Mapping):
        key = split or ("train" if "train" in source else next(iter(source), "train"))
        if key not in source:
            raise ValueError(f"{name} has no split {key!r}: it has {list(source)[:20]}")
        source = source[key]
    random_access = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not random_access or hasattr(source, "columns"):  # a stream, a generator; a table of pandas or pyarrow
        raise ValueError(f"{name} is not a sequence of records: expected a list of dicts or a datasets.Dataset")
    if names := getattr(source, "column_names", None):
        source = source.select_columns(columns.wanted(names, name))

    def read(index: int) -> Any:
        try:
            return source[index]
        except Exception as error:
            raise ValueError(f"{where(index)} cannot be read: {one_line(error)}") from None

    def where(index: int) -> str:
        return f"{name}, record {index + 1}"

    if not len(source):
        raise ValueError(f"{name} is empty: expected one record or more")
    return Rows(len(source), read, where)


# -------------------------------------------------------------------------------------------------------- kinds of file


def open_json(path: Path) -> tuple[Lines, Any]:
    """Return the records of a .json file, and its value of `corpus` (None: absent).

    It is a list of records, an object {data: [...]} or {corpus, data: [...]}, or has one record a line. Only the places
    of the records are kept, whatever the layout.
    """
    lines = Lines(path)
    try:
        if not len(lines) or (len(lines) > 1 and isinstance(lines[0], dict)):
            return lines, None
    except ValueError:  # its records are laid out over several lines
        pass
    content = lines.content
    try:
        places = arrays_made_once([path], "records", None, lambda: _json_records(content.mapped(), len(lines)))
        corpora = json_value(places["corpora"].tobytes()) if len(places["corpora"]) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON that holds records: {error}. Expected one JSON object a line, a list of records, or "
            f"{BY_ID}"
        ) from None
    if not len(places["starts"]):
        raise ValueError(f"{path} is empty: it holds no record")
    not_read(str(path), places["unread"].tobytes().decode().splitlines())
    return Lines(path, content=content, bounds=places, unit="record"), corpora


def _json_records(data: memoryview, num_lines: int) -> Arrays:
    """Return `starts` and `stops` of the records, the text of `corpora`, and the names of what is `unread`."""
    text, dtype = JsonText(data), places_dtype(len(data))
    records = array(dtype.char)
    members: dict[str, tuple[int, ...]] = {}

    def read_records() -> None:
        for _ in text.items("[", "]"):
            records.extend(text.value())

    if text.next() == "{":
        start = text.place
        for _ in text.items("{", "}"):
            name = json_value(bytes(data[slice(*text.value())]))
            if not isinstance(name, str) or name in members:
                raise ValueError(f"the key {show(name)} before byte {text.place} is not a text, or stands twice")
            text.take(":")
            if name == "data":
                read_records()
            members[name] = () if name == "data" else text.value()
        if "data" not in members:
            if num_lines > 1:
                raise ValueError(f"it is one object over several lines, with the keys {listed(list(members))}")
            records.extend((start, text.place))
            members = {}
    else:
        read_records()
    if text.next():
        raise ValueError(f"something follows at byte {text.place}")
    starts, stops = np.frombuffer(records, dtype).reshape(-1, 2).T
    unread = "\n".join(" ".join(name.split()) for name in members if name not in ("data", "corpus"))
    return {
        "starts": starts,
        "stops": stops,
        "corpora": np.frombuffer(data[slice(*members.get("corpus", (0, 0)))], np.uint8),
        "unread": np.frombuffer(unread.encode(), np.uint8),
    }


def _delimited(path: Path, columns: Columns) -> Lines:
    """Return the rows of a CSV or TSV file, under the names of its header.

    The cells of a .csv may be quoted, over several lines too; so may those of a .tsv with a header, if all its quotes
    obey the rules of CSV. Otherwise, and in MS MARCO's files without a header, quotes are text.
    """
    lines = Lines(path, text_value)
    if not len(lines):
        return lines
    first, tabs = lines[0], suffix(path) == ".tsv"
    delimiter = "\t" if tabs else next((mark for mark in ",;\t" if mark in first), ",")
    if (count := first.count(delimiter)) > _MOST_COLUMNS:
        raise ValueError(f"{lines.where(0)} has {count + 1} cells: expected a header of at most {_MOST_COLUMNS}")
    try:
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter))]
    except csv.Error as error:
        if not tabs:
            raise ValueError(f"{lines.where(0)} is not CSV: {error}") from None
        names = first.split(delimiter)
    if not columns.knows(names):
        names = _usual_names(path, first.split("\t")) if tabs else None
        if names is None:
            raise ValueError(
                f"{path}: no cell of the first line names a known column: {show(first)}. Add a header, or name its "
                "columns yourself: columns: {<field>: <name>}"
            )
        return Lines(path, partial(_plain_row, names, ()), content=lines.content)
    wanted = columns.wanted(names, str(path))
    try:
        settings = (delimiter, names)
        bounds = arrays_made_once([path], "csv rows", settings, lambda: _csv_bounds(lines, delimiter, names))
        return Lines(path, partial(_csv_row, names, wanted, delimiter), content=lines.content, bounds=bounds)
    except ValueError:
        if not tabs:
            raise
        return Lines(path, partial(_plain_row, names, wanted), content=lines.content, skip=1)


def _usual_names(path: Path, cells: Sequence[str]) -> list[str] | None:
    """Return the columns of MS MARCO's files, which have no header."""
    name = path.name.lower()
    if "triples" in name and len(cells) == 3:
        by_id = all(cell.isdecimal() for cell in cells)
        return ["query_id", "positive_ids", "negative_ids"] if by_id else ["query", "positive", "negative"]
    if len(cells) == 4 and "docs" in name:
        return ["id", "url", "title", "text"]
    return ["id", "text"] if len(cells) == 2 and re.search("[0-9]", cells[0]) else None


def _csv_bounds(lines: Lines, delimiter: str, names: Sequence[str]) -> Arrays:
    """Return where the rows after the header lie; ValueError for a row that is not CSV, or has other cells."""
    dtype = places_dtype(lines.nbytes)
    starts, stops = array(dtype.char), array(dtype.char)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = 0  # lines
    try:
        for row in reader:  # it takes the lines of one row at a time
            if any(cell.strip() for cell in row):
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} cells, expected {len(names)}: {listed(names)}")
                starts.append(lines.stops[before - 1] + 1 if before else 0)
                stops.append(lines.stops[reader.line_num - 1])
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{lines.where(before)} is not CSV: {error}") from None
    return {"starts": np.frombuffer(starts, dtype)[1:], "stops": np.frombuffer(stops, dtype)[1:]}


def _csv_row(names: Sequence[str], wanted: Sequence[str], delimiter: str, line: bytes) -> dict[str, str | None]:
    return _row(names, wanted, next(csv.reader([text_value(line)], delimiter=delimiter)))


def _plain_row(names: Sequence[str], wanted: Sequence[str], line: bytes) -> dict[str, str | None]:
    cells = text_value(line).split("\t")
    if len(cells) != len(names):
        raise ValueError(f"has {len(cells)} cells, expected {len(names)}: {listed(names)}")
    return _row(names, wanted, cells)


def _row(names: Sequence[str], wanted: Sequence[str], cells: Sequence[str]) -> dict[str, str | None]:
    """Return the cells by name; an empty one is null, which these files cannot tell from an empty text."""
    row = {name: cell or None for name, cell in zip(names, cells, strict=True)}
    for cell in filter(None, map(row.get, wanted)):
        if cell[0] == "[" and _LIST.fullmatch(cell):
            raise ValueError(
                f"holds a list in a cell, {show(cell)}, where a cell is one text: give each text a column "
                "(negative_1, negative_2), or write JSONL or Parquet"
            )
    return row
