"""Texts with ids that stay on disk: a corpus, or the queries of a BEIR folder."""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from inbatch.data.columns import Where, id_text
from inbatch.data.lines import Lines, Rows
from inbatch.data.records import ID_NAMES, Passage, normalised
from inbatch.ids import stable_id


class Documents(Rows[Passage]):
    """The documents of one or several files of records ``{_id, title, text}``, found by row or by id.

    Held in memory: 32 bytes a document. Opening reads every record once, so that a broken one is reported here. Of
    documents with equal texts all get the id of the first: a copy of a positive is no negative, whatever its id.
    Row order is file order; ``own_ids()`` gives the ids as written.
    """

    def __init__(self, files: Sequence[Lines]):
        self._files = files
        self._first_row = np.cumsum([0] + [len(lines) for lines in files])
        keys, texts = (np.empty(len(self), np.int64) for _ in range(2))
        for row in range(len(self)):
            passage = self.own(row)
            assert passage.doc_id is not None
            keys[row] = stable_id("", passage.doc_id)
            texts[row] = stable_id("", normalised(passage.full_text))
        self._rows_by_key = np.argsort(keys, kind="stable")
        self._sorted_keys = keys[self._rows_by_key]
        self._check_unique()
        _, first, group = np.unique(texts, return_index=True, return_inverse=True)
        self._first_of_equals = first[group] if len(first) < len(texts) else None

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def _read(self, index: int) -> Passage:
        passage = self.own(index)
        first = index if self._first_of_equals is None else int(self._first_of_equals[index])
        return passage if first == index else Passage(passage.text, passage.title, self.own(first).doc_id)

    def own(self, row: int) -> Passage:
        """The document of a row under the id written in its record."""
        lines, local = self._locate(row)
        return parse_document(lines[local], lambda: lines.where(local))

    def own_ids(self) -> Iterator[str]:
        """Every document's id as written, in row order."""
        for row in range(len(self)):
            doc_id = self.own(row).doc_id
            assert doc_id is not None
            yield doc_id

    def row(self, doc_id: str) -> int | None:
        """The row of an id; None where it is unknown."""
        key = stable_id("", doc_id)
        place = int(np.searchsorted(self._sorted_keys, key))
        if place == len(self) or self._sorted_keys[place] != key:
            return None
        return int(self._rows_by_key[place])

    def _locate(self, row: int) -> tuple[Lines, int]:
        file = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return self._files[file], row - int(self._first_row[file])

    def _where(self, row: int) -> str:
        lines, local = self._locate(row)
        return lines.where(local)

    def _check_unique(self) -> None:
        repeats = np.flatnonzero(self._sorted_keys[1:] == self._sorted_keys[:-1])
        if len(repeats):
            first, second = (int(row) for row in self._rows_by_key[repeats[0] : repeats[0] + 2])
            raise ValueError(
                f"{self._where(second)}: the id {self.own(second).doc_id!r} is taken by {self._where(first)} "
                f"({len(repeats)} such records). Expected each id once: delete or rename the repeated records."
            )


class DocumentTexts(Rows[str]):
    """The full texts (title and text joined) of ``Documents``, read on access."""

    def __init__(self, documents: Documents):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def _read(self, index: int) -> str:
        return self._documents.own(index).full_text


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
    return Documents([lines])
