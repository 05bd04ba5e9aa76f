"""Texts with ids that stay on disk: a corpus, or the queries of a BEIR folder."""

import os
from collections.abc import Iterator, Mapping

import numpy as np

from inbatch.data.columns import id_text
from inbatch.data.index import Arrays
from inbatch.data.lines import Lines, Rows, Where, scanned
from inbatch.data.records import ID_NAMES, Passage, normalised
from inbatch.ids import stable_id


class Documents(Rows[Passage]):
    """The documents of one or several files of records ``{_id, title, text}``, found by row or by id.

    Every record is parsed once (see ``scanned``), so that a broken one is reported when opening. Of documents with
    equal texts all get the id of the first: a copy of a positive is no negative, whatever its id. Row order is file
    order; ``own_ids()`` gives the ids as written.
    """

    def __init__(self, records: Rows):
        self._records = records
        super().__init__(len(records), self._as_trained, records.where, files=records.files)
        found = scanned(records, "documents", None, _facts, finish=self._index)
        self._rows_by_key, self._sorted_keys = found["rows_by_key"], found["sorted_keys"]
        self._first_of_equals = found["first_of_equals"]
        self._ids, self._id_ends = found["ids"], found["id_ends"]

    def _as_trained(self, index: int) -> Passage:
        passage = self.own(index)
        first = int(self._first_of_equals[index]) if len(self._first_of_equals) else index
        return passage if first == index else Passage(passage.text, passage.title, self.own(first).doc_id)

    def own(self, row: int) -> Passage:
        """The document of a row under the id written in its record."""
        return parse_document(self._records[row], lambda: self.where(row))

    def own_ids(self) -> Iterator[str]:
        """Every document's id as written, in row order."""
        start = 0
        for stop in self._id_ends.tolist():
            yield self._ids[start:stop].tobytes().decode()
            start = stop

    def row(self, doc_id: str) -> int | None:
        """The row of an id; None where it is unknown."""
        key = stable_id("", doc_id)
        place = int(np.searchsorted(self._sorted_keys, key))
        if place == len(self) or self._sorted_keys[place] != key:
            return None
        return int(self._rows_by_key[place])

    def _index(self, found: Arrays) -> Arrays:
        """Order the keys, find equal texts, and check that no two documents have one id."""
        rows_by_key = np.argsort(found["keys"], kind="stable")
        sorted_keys = found["keys"][rows_by_key]
        _, first, group = np.unique(found["texts"], return_index=True, return_inverse=True)
        repeats = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1])
        if len(repeats):
            first, second = rows_by_key[repeats[0] : repeats[0] + 2].tolist()
            raise ValueError(
                f"{self.where(second)}: the id {self.own(second).doc_id!r} is taken by {self.where(first)} "
                f"({len(repeats)} such records). Expected each id once: delete or rename the repeated records."
            )
        return {
            "rows_by_key": rows_by_key,
            "sorted_keys": sorted_keys,
            "first_of_equals": first[group] if len(first) < len(group) else np.empty(0, np.int64),
            "ids": found["ids"],
            "id_ends": np.cumsum(found["id_lengths"]),
        }


class DocumentTexts(Rows[str]):
    """The full texts (title and text joined) of ``Documents``, read on access."""

    def __init__(self, documents: Documents):
        super().__init__(len(documents), lambda row: documents.own(row).full_text, documents.where)


def _facts(records: Iterator[tuple[object, Where]]) -> Arrays:
    """Return what is kept of some documents: hashes of ids and of texts, and the ids."""
    passages = [parse_document(record, where) for record, where in records]
    ids = [passage.doc_id or "" for passage in passages]
    encoded = [doc_id.encode() for doc_id in ids]
    return {
        "keys": np.array([stable_id("", doc_id) for doc_id in ids], np.int64),
        "texts": np.array([stable_id("", normalised(passage.full_text)) for passage in passages], np.int64),
        "ids": np.frombuffer(b"".join(encoded), np.uint8),
        "id_lengths": np.array(list(map(len, encoded)), np.int64),
    }


def parse_document(record: object, where: Where) -> Passage:
    """A ``Passage`` with an id from ``{_id, title, text}``; ``where()`` names the record in messages."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where()}: expected an object with an id and a text, found {type(record).__name__}")
    name = next((name for name in ID_NAMES if record.get(name) not in (None, "")), None)
    text, title = record.get("text"), record.get("title") or ""
    if name is None or not isinstance(text, str) or not isinstance(title, str):
        raise ValueError(
            f"{where()}: expected an id ({', '.join(ID_NAMES)}), a string `text` and optionally a string `title`, "
            f"found {_describe(record)}"
        )
    return Passage(text, title, id_text(record[name], name, where))


def _describe(record: Mapping) -> str:
    return "{" + ", ".join(f"{name}: {type(value).__name__}" for name, value in record.items()) + "}"


def open_documents(path: str | os.PathLike) -> Documents:
    """``Documents`` of one JSONL file."""
    lines = Lines(path)
    if not len(lines):
        raise ValueError(f"{path} is empty: expected one JSON object {{_id, title, text}} a line")
    return Documents(lines)
