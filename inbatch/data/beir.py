"""BEIR folders: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv`` (Thakur et al. 2021), each also as .gz."""

import os
from pathlib import Path

import numpy as np

from inbatch.data.columns import without_positives
from inbatch.data.corpus import Documents, DocumentTexts, open_documents
from inbatch.data.examples import Examples
from inbatch.data.lines import find_file, open_text
from inbatch.data.records import Example, RetrievalData

Qrels = dict[str, dict[str, int]]


def load_retrieval(path: str | os.PathLike, split: str = "test") -> RetrievalData:
    """The retrieval test set of one split of a BEIR folder.

    Queries are those of the split, in the order of its qrels; the corpus is always the whole one, its texts read
    from disk on access. ValueError: a missing file or split, a record or row that is malformed, an id of the qrels
    that is in no corpus or no queries, an id that occurs twice.
    """
    folder = Path(path)
    corpus, queries, qrels = _open_folder(folder, split)
    ids = list(qrels)
    return RetrievalData(
        query_ids=ids,
        queries=[queries.own(_known(queries, query_id)).text for query_id in ids],
        doc_ids=list(corpus.own_ids()),
        documents=DocumentTexts(corpus),
        qrels=qrels,
    )


class BeirExamples(Examples):
    """The training examples of one split of a BEIR folder, one a query with a relevant document.

    Documents judged not relevant (a score of 0 or less) are its hard negatives.
    """

    def __init__(self, folder: str | os.PathLike, split: str):
        self._name = str(folder)
        self._corpus, self._queries, qrels = _open_folder(Path(folder), split)
        relevant = {query_id: grades for query_id, grades in qrels.items() if max(grades.values()) > 0}
        if not relevant:
            raise ValueError(f"{folder}: no row of qrels split {split!r} has a score above 0, so nothing to train on")
        self._query_rows = np.array([_known(self._queries, query_id) for query_id in relevant], np.int64)
        # One flat array of (document row, grade), cut by offsets: Python containers would cost ten times as much.
        self._offsets = np.cumsum([0] + [len(grades) for grades in relevant.values()])
        judged = [(_known(self._corpus, doc), grade) for grades in relevant.values() for doc, grade in grades.items()]
        self._doc_rows, self._grades = np.array(judged, np.int64).T
        super().__init__(len(self._query_rows), self._example, self._place)

    def _place(self, index: int) -> str:
        return self._queries.where(int(self._query_rows[index]))

    def _example(self, index: int) -> Example:
        query = self._queries[int(self._query_rows[index])]
        judged = slice(self._offsets[index], self._offsets[index + 1])
        rows, relevant = self._doc_rows[judged], self._grades[judged] > 0
        positives, negatives = ([self._corpus[int(row)] for row in rows[which]] for which in (relevant, ~relevant))
        return Example(
            query=query.text,
            query_id=query.doc_id,
            positives=tuple(positives),
            negatives=tuple(without_positives(positives, negatives)),
            corpus=self._name,
        )


def is_beir_folder(folder: Path) -> bool:
    return find_file(folder, "corpus.jsonl") is not None and (folder / "qrels").is_dir()


def _open_folder(folder: Path, split: str) -> tuple[Documents, Documents, Qrels]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected a BEIR folder (corpus.jsonl, queries.jsonl, qrels/*.tsv)")
    corpus_path, queries_path = _file(folder, "corpus.jsonl"), _file(folder, "queries.jsonl")
    qrels_path = find_file(folder / "qrels", f"{split}.tsv")
    if qrels_path is None:
        splits = sorted({entry.name.split(".tsv")[0] for entry in (folder / "qrels").glob("*.tsv*")})
        raise ValueError(f"{folder} has no qrels split {split!r}: it has {splits}")
    qrels, lines = read_qrels(qrels_path)
    corpus, queries = open_documents(corpus_path), open_documents(queries_path)
    for query_id, grades in qrels.items():
        for doc_id in grades:
            for kind, known, key, home in (
                ("query", queries, query_id, queries_path),
                ("document", corpus, doc_id, corpus_path),
            ):
                if known.row(key) is None:
                    raise ValueError(
                        f"{qrels_path}, line {lines[query_id, doc_id]}: the {kind} id {key!r} is not in {home}. "
                        "Expected every id of the qrels there: add the record or delete the line."
                    )
    return corpus, queries, qrels


def _file(folder: Path, name: str) -> Path:
    path = find_file(folder, name)
    if path is None:
        found = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"{folder} has no {name} (nor {name}.gz): expected a BEIR folder with corpus.jsonl, queries.jsonl and "
            f"qrels/*.tsv, found {found}"
        )
    return path


def read_qrels(path: Path) -> tuple[Qrels, dict[tuple[str, str], int]]:
    """Judgements of a tab-separated file (query-id, corpus-id, score; header optional) and each pair's line number."""
    qrels: Qrels = {}
    lines: dict[tuple[str, str], int] = {}
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            cells = line.rstrip("\r\n").split("\t")
            score = _integer(cells[2]) if len(cells) == 3 else None
            if score is None:
                if number == 1 and len(cells) == 3 and not _is_number(cells[2]):
                    continue  # the header
                raise ValueError(
                    f"{path}, line {number}: expected three tab-separated cells, query-id, corpus-id and an integer "
                    f"score, found {line.rstrip()[:80]!r}"
                )
            qrels.setdefault(cells[0], {})[cells[1]] = score
            lines[cells[0], cells[1]] = number
    if not qrels:
        raise ValueError(f"{path} has no judgements: expected lines of query-id, corpus-id, score")
    return qrels, lines


def _integer(cell: str) -> int | None:
    try:
        return int(cell)
    except ValueError:
        return None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _known(documents: Documents, doc_id: str) -> int:
    row = documents.row(doc_id)
    assert row is not None, doc_id  # _open_folder has checked every id
    return row
