"""Training examples from files and folders, whatever their format."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from inbatch.data.beir import BeirExamples, is_beir_folder
from inbatch.data.columns import find_columns
from inbatch.data.corpus_id import SHAPE, Corpora, CorpusIdExamples
from inbatch.data.examples import Examples, InlineExamples
from inbatch.data.lines import Lines, Rows, joined, spooled
from inbatch.data.parquet import ParquetRows, parquet_names
from inbatch.data.records import Example

GivenColumns = Mapping[str, str | Sequence[str]] | None
KINDS = "*.jsonl, *.json (each also .gz), *.parquet, or a BEIR folder (corpus.jsonl, queries.jsonl, qrels/*.tsv)"


def open_examples(
    paths: str | os.PathLike | Sequence[str | os.PathLike], *, split: str = "train", columns: GivenColumns = None
) -> Sequence[Example]:
    """The training examples of one or several sources, one after the other, with random access.

    A source is a JSONL or Parquet file of inline records (columns found by their usual names, or named by
    ``columns``: our field -> column, fields query, query_id, positive, negative, corpus), a corpus-id JSON file, or a
    BEIR folder, of which ``split`` is read. Examples are parsed on access; memory holds their places in the file
    (about 16 bytes each), not their texts. Opening reads everything once, so that whatever is wrong is said now.

    Inline ids belong to the record's ``corpus_id`` or else to the path as given: files that share documents under the
    same ids should name a common ``corpus_id``. Negatives that equal a positive are left out, with a warning.

    Raises ValueError naming file and line: a missing, empty or unreadable file, a record that is no JSON object or
    has no query or no positive, values of a wrong type, unknown or ambiguous columns, an unknown split, an id that is
    not in its corpus, an id that occurs twice in a corpus.
    """
    sources = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not sources:
        raise ValueError(f"no training data given: expected one or more of {KINDS}")
    corpora: Corpora = {}
    opened = [_open(Path(source), split, columns, corpora) for source in sources]
    for source, examples in zip(sources, opened, strict=True):
        if examples.left_out:
            warnings.warn(
                f"{source}: {examples.left_out} of {len(examples)} records "
                f"({examples.left_out / len(examples):.1%}) have a negative that equals one of their positives. Those "
                "negatives are left out; mine again with the known positives excluded.",
                stacklevel=2,
            )
    return joined(opened)


def _open(path: Path, split: str, columns: GivenColumns, corpora: Corpora) -> Examples:
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected {KINDS}")
    if path.is_dir():
        if not is_beir_folder(path):
            found = sorted(entry.name for entry in path.iterdir())[:20]
            raise ValueError(f"{path} is not a BEIR folder: expected {KINDS}, found a folder with {found}")
        _refuse(columns, path, "a BEIR folder")
        return BeirExamples(path, split)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        used = find_columns(parquet_names(path), columns, lambda: str(path))
        lines = ParquetRows(path, used.used)
        _not_empty(lines, path)
        return InlineExamples(lines, used, str(path))
    if name.endswith((".jsonl", ".ndjson")):
        return _inline(Lines(path), columns)
    if name.endswith(".json"):
        return _open_json(path, columns, corpora)
    raise ValueError(f"{path} is of no known kind: expected {KINDS}")


def _open_json(path: Path, columns: GivenColumns, corpora: Corpora) -> Examples:
    """A .json file is a corpus-id file, a list of records, or (as some write it) one record a line."""
    lines = Lines(path)
    _not_empty(lines, path)
    try:
        content = lines[0]
    except ValueError:  # laid out over several lines
        content = lines.whole()
        if isinstance(content, dict) and not content.keys() >= {"corpus", "data"}:
            raise ValueError(
                f"{path} is one object over several lines, with the keys {list(content)[:20]}: expected one JSON "
                f"object a line, a list of records, or {SHAPE}"
            ) from None
    if isinstance(content, dict) and not content.keys() >= {"corpus", "data"}:
        return _inline(lines, columns)
    if isinstance(content, list):
        return _inline(spooled(path, content, unit="record"), columns)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected {SHAPE}, a list of records or one record a line, found {content!r:.60}")
    _refuse(columns, path, "a corpus-id file")
    return CorpusIdExamples(path, content, corpora)


def _inline(lines: Lines, columns: GivenColumns) -> Examples:
    _not_empty(lines, lines.path)
    # Records may lack what they have none of, so the names are those of the first hundred together.
    names = dict.fromkeys(name for record in lines[:100] if isinstance(record, dict) for name in record)
    return InlineExamples(lines, find_columns(list(names), columns, lambda: str(lines.path)), str(lines.path))


def _not_empty(lines: Rows, path: Path) -> None:
    if not len(lines):
        raise ValueError(f"{path} is empty: expected one record a line, or {SHAPE}")


def _refuse(columns: GivenColumns, path: Path, kind: str) -> None:
    if columns:
        raise ValueError(f"{path} is {kind}, whose columns are fixed: leave `columns` out (got {dict(columns)})")
