"""Texts with ids that stay on disk: a corpus, or the queries of a retrieval set; in any format."""

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from inbatch.data.columns import DOCUMENT, Columns, GivenColumns, document, empty, not_read, show
from inbatch.data.index import Arrays
from inbatch.data.lines import Lines, Rows, Where, json_value, places_dtype, scanned, text_value
from inbatch.data.records import Passage
from inbatch.data.tables import BY_ID, find_part, name_of, open_table, suffix
from inbatch.ids import stable_id

CORPUS_NAMES = ("corpus", "collection", "msmarco-docs")
METADATA = "merlin_metadata.json"


class Documents(Rows[Passage]):
    """The documents of a table with columns for id, text and title, found by row or by id; row order is file order.

    Every record is parsed once (see `scanned`), so that a broken one is reported when opening. has_ids: False where the
    table has none, and documents are found by row alone.
    """

    def __init__(self, name: str, records: Rows[Any], columns: Columns, has_ids: bool):
        self.name, self.has_ids, self._columns = name, has_ids, columns

        def read(row: int) -> Passage:
            return self._parse(records[row], partial(records.where, row))

        super().__init__(len(records), read, records.where, files=records.files, nbytes=records.nbytes)
        index = scanned(records, "documents", (columns.given, has_ids), self._facts, finish=self._index)
        # As memoryviews, of which single elements are found fastest.
        self._rows_by_key, self._sorted_keys = index["rows_by_key"].data, index["sorted_keys"].data
        self._ids, self._id_ends = index["ids"], index["id_ends"]
        columns.learn(index["columns"])
        not_read(name, columns.all_unread(), ". What is read: an id, a text and a title")

    def _parse(self, record: object, where: Where) -> Passage:
        return document(record, self._columns, where, needs_id=self.has_ids)

    @property
    def texts(self) -> Rows[str]:
        """Return the full texts, title and text joined, read on access."""
        return Rows(len(self), lambda row: self[row].full_text, self.where, files=self.files, nbytes=self.nbytes)

    def ids(self) -> Iterator[str]:
        """Yield every document's id, in row order."""
        start = 0
        for stop in map(int, self._id_ends):
            yield self._ids[start:stop].tobytes().decode()
            start = stop

    def row(self, doc_id: str) -> int | None:
        """Return the row of an id; None where it is unknown."""
        key = stable_id("", doc_id)
        place = bisect_left(self._sorted_keys, key)
        found = place < len(self) and self._sorted_keys[place] == key
        return self._rows_by_key[place] if found else None

    def find(self, doc_id: str | None) -> Passage | None:
        """Return the document of an id; None where it is unknown."""
        row = None if doc_id is None else self.row(doc_id)
        return None if row is None else self[row]

    def _facts(self, records: Iterator[tuple[object, Where]]) -> Arrays:
        """Return what is kept of some documents: their ids, hashed and as written, and the columns that they have."""
        keys, lengths, ids = array("q"), array("I"), bytearray()
        for record, where in records:
            doc_id = self._parse(record, where).doc_id or ""
            if doc_id and not self.has_ids:
                raise ValueError(f"{where()}: the record has an id, and the first has none: give all an id, or none")
            encoded = doc_id.encode()
            keys.append(stable_id("", doc_id))
            lengths.append(len(encoded))
            ids += encoded
        return {
            "keys": np.array(keys, np.int64),
            "ids": np.array(ids, np.uint8),
            "id_lengths": np.array(lengths, np.uint32),
            "columns": self._columns.seen(),
        }

    def _index(self, facts: Arrays) -> Arrays:
        """Order the keys, and check that no two documents have the same id."""
        rows_by_key = np.argsort(facts["keys"], kind="stable").astype(places_dtype(len(self)))
        sorted_keys = facts["keys"][rows_by_key]
        repeats = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1])
        if self.has_ids and len(repeats):
            first, second = rows_by_key[repeats[0] : repeats[0] + 2].tolist()
            raise ValueError(
                f"{self.where(second)}: the id {self[second].doc_id!r:.80} is taken by {self.where(first)} "
                f"({len(repeats)} such records). Expected each id once: delete or rename the repeated records."
            )
        return {
            "rows_by_key": rows_by_key,
            "sorted_keys": sorted_keys,
            "ids": facts["ids"],
            "id_ends": np.cumsum(facts["id_lengths"], dtype=places_dtype(len(facts["ids"]))),
            "columns": facts["columns"],
        }


def open_corpus(
    source: Any, *, columns: GivenColumns | None = None, split: str | None = None, needs_ids: bool = True
) -> Documents:
    """Open the documents of any source: a judged folder (its corpus), what `open_table` reads, or a text file.

    source: records with an id, a text and optionally a title, under their usual names or those of `columns` (our field
    id, text, title -> column). split: as `open_table` takes it. needs_ids: if False, a source without any id may be
    opened too, such as a .txt file with a text a line; `Documents.has_ids` is then False.

    Raises ValueError, naming file and place, for what cannot be read, lacks a text or an id, or has an id twice.
    """
    described = Columns(DOCUMENT, columns)
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None:
        source = corpus_within(path)
    if path is not None and suffix(path) == ".txt" and path.is_file():
        rows: Rows[Any] = Lines(path, lambda line: {"text": text_value(line).strip()})
    else:
        rows = open_table(source, described, split)
    if not len(rows):
        raise ValueError(f"{source} is empty: expected one text a line")
    first = rows[0]
    has_ids = not isinstance(first, Mapping) or any(not empty(first[name]) for name in described.layout(first)["id"])
    documents = Documents(name_of(source), rows, described, needs_ids or has_ids)
    if missing := described.missing():
        raise ValueError(
            f"{documents.name}: columns names {list(missing)}, but the columns are {list(described.roles)}"
        )
    return documents


def corpus_within(path: Path) -> Path:
    """Return the file or folder of a judged folder's corpus; any other path as it is."""
    return (find_part(path, *CORPUS_NAMES) if path.is_dir() else None) or path


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that records name by id, where they are, and the instructions before queries and passages, if any."""

    documents: Documents
    place: str
    query_prefix: str | None = None
    passage_prefix: str | None = None


# By NeMo's corpus_id, or else by path: sources that share a corpus share its index.
Corpora = dict[str, Corpus]


def key_of(part: Any) -> str:
    """Return what tells one corpus from another: its path, or which object it is."""
    return str(part) if isinstance(part, (str, os.PathLike)) else f"{name_of(part)} at {id(part):x}"


def open_once(part: Any, corpora: Corpora) -> tuple[str, Corpus]:
    """Open documents, unless some source did so before, and return their key and them."""
    name = key_of(part)
    if name not in corpora:
        corpora[name] = Corpus(documents=open_corpus(part), place=name)
    return name, corpora[name]


def open_corpora(path: Path, places: Any, corpora: Corpora) -> list[str]:
    """Open the corpus folders that NeMo AutoModel's corpus-id file names, each once, and return their corpus_ids.

    A folder holds merlin_metadata.json (see `open_described`) and files of {id, text, title}; its path is relative to
    the file's.
    """
    places = [places] if isinstance(places, Mapping) else places
    if not isinstance(places, list) or not all(
        isinstance(p, Mapping) and isinstance(p.get("path"), str) for p in places
    ):
        raise ValueError(f"{path}: expected {BY_ID}, found another `corpus`: {show(places)}")
    names = []
    for folder in ((path.parent / place["path"]).resolve() for place in places):
        metadata = folder / METADATA
        if not metadata.is_file():
            raise ValueError(f"{metadata} does not exist: expected it in a corpus folder, holding {{class, corpus_id}}")
        names.append(open_described(metadata, str(folder), partial(open_corpus, folder), corpora, {}))
    return names


def open_described(
    path: Path, place: str, opened: Callable[[], Documents], corpora: Corpora, usual: Mapping[str, str]
) -> str:
    """Open the documents at `place`, unless some source did so before, and return their corpus_id.

    path: NeMo's metadata, {class: TextQADataset, corpus_id, query_instruction, passage_instruction}, over the `usual`.
    """
    try:
        metadata = json_value(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    read = ("class", "corpus_id", "query_instruction", "passage_instruction")
    texts = {key: metadata.get(key) or usual.get(key, "") for key in read} if isinstance(metadata, dict) else {}
    if not all(isinstance(text, str) for text in texts.values()) or texts.get("class") != "TextQADataset":
        texts = {}
    if not texts.get("corpus_id"):
        raise ValueError(f"{path}: expected {{class: TextQADataset, corpus_id: <name>}}, found {show(metadata)}")
    name, *instructions = (texts[key] for key in read[1:])
    if name not in corpora:
        not_read(str(path), [key for key in metadata if key not in read])
        query_prefix, passage_prefix = (f"{text} " if text else None for text in instructions)
        corpora[name] = Corpus(
            documents=opened(), place=place, query_prefix=query_prefix, passage_prefix=passage_prefix
        )
    elif corpora[name].place != place:
        raise ValueError(f"corpus_id {name!r} names two corpora, {corpora[name].place} and {place}: rename one")
    return name
