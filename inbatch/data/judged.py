"""Folders of a corpus, queries and judgements: as BEIR, MTEB and MS MARCO lay them out, in any kind of file.

corpus.jsonl  queries.jsonl  qrels/test.tsv                     BEIR (Thakur et al. 2021); MTEB: qrels/test.jsonl
corpus/*.parquet  queries/*.parquet  data/test-*.parquet        MTEB on the hub
collection.tsv  queries.train.tsv  qrels.train.tsv              MS MARCO
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest
from pathlib import Path

import numpy as np

from inbatch.data.columns import JUDGEMENT, Columns, not_read, notice, show
from inbatch.data.corpus import CORPUS_NAMES, Documents, open_corpus
from inbatch.data.identity import without_positives
from inbatch.data.lines import Lines, Rows, chosen, text_value
from inbatch.data.records import Example, RetrievalData
from inbatch.data.tables import SUFFIXES, find_part, has_split, listing, open_file, suffix
from inbatch.ids import stable_id

Qrels = dict[str, dict[str, int]]
SHAPE = "a corpus (corpus.jsonl), queries (queries.jsonl) and qrels/<split>.tsv, or MTEB's or MS MARCO's names of these"
_TEXT = (".tsv", ".txt", ".trec")
_NOT_READ = ("top_ranked", "instruction", "qrel_diff")  # MTEB's tasks that rerank, or follow instructions
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+$")
_SCORE = re.compile(r"[+-]?[0-9]{1,9}(\.0*)?", re.ASCII)


@dataclass(frozen=True)
class Judged:
    """One split of a retrieval folder."""

    corpus: Documents
    queries: Documents
    qrels: Qrels


def load_retrieval(path: str | os.PathLike, split: str = "test") -> RetrievalData:
    """Open the retrieval test set of one split of a folder.

    Queries are those of the split, in the order of its qrels; the corpus is always the whole one, its texts read
    from disk on access. A judged document that is not in the corpus stays in the qrels, as never found, with a warning.

    Raises ValueError, naming file and place, for a missing file or split, a record or row that is malformed, a query of
    the qrels that is not among the queries, an id that occurs twice.
    """
    judged = open_judged(Path(path), split)
    queries = [judged.queries.find(query_id) for query_id in judged.qrels]
    return RetrievalData(
        query_ids=list(judged.qrels),
        queries=[query.full_text for query in queries if query is not None],
        doc_ids=list(judged.corpus.ids()),
        documents=judged.corpus.texts,
        qrels=judged.qrels,
    )


def sample(data: RetrievalData, queries: int | None, documents: int | None) -> RetrievalData:
    """Return a part of a test set that depends on its ids alone: so many queries, and documents to search in.

    All documents that are relevant to one of these queries are among them; None takes all.
    """

    def first(ids: Iterable[str], what: str, number: int | None) -> list[str]:
        return nsmallest(number, ids, key=partial(stable_id, f"sample of {what}")) if number is not None else list(ids)

    asked = set(first(data.query_ids, "queries", queries))
    qrels = {query: grades for query, grades in data.qrels.items() if query in asked}
    judged = {doc for grades in qrels.values() for doc, grade in grades.items() if grade > 0}
    relevant = judged.intersection(data.doc_ids)
    others = None if documents is None else max(0, documents - len(relevant))
    kept = relevant.union(first((doc for doc in data.doc_ids if doc not in relevant), "documents", others))
    rows = [row for row, doc in enumerate(data.doc_ids) if doc in kept]
    places = [place for place, query in enumerate(data.query_ids) if query in asked]
    return RetrievalData(
        query_ids=[data.query_ids[place] for place in places],
        queries=[data.queries[place] for place in places],
        doc_ids=[data.doc_ids[row] for row in rows],
        documents=chosen(data.documents, rows),
        qrels=qrels,
    )


def judged_examples(folder: Path, judged: Judged, split: str) -> Rows[Example]:
    """Return the training examples of a split, one a query with a relevant document.

    Documents judged not relevant (a score of 0 or less) are its hard negatives.
    """
    corpus, queries = judged.corpus, judged.queries
    query_rows, sizes, doc_rows, grades = [], [0], [], []
    for query_id, of_query in judged.qrels.items():
        known = [(row, grade) for doc_id, grade in of_query.items() if (row := corpus.row(doc_id)) is not None]
        if any(grade > 0 for _, grade in known):
            query_rows.append(queries.row(query_id))
            sizes.append(len(known))
            doc_rows += [row for row, _ in known]
            grades += [grade for _, grade in known]
    if not query_rows:
        raise ValueError(f"{folder}: no row of qrels split {split!r} has a score above 0, so nothing to train on")
    # Flat arrays, cut by offsets: Python containers would cost ten times as much.
    row_of_query, offsets = np.array(query_rows, np.int64), np.cumsum(sizes)
    row_of_doc, relevant = np.array(doc_rows, np.int64), np.array(grades, np.int64) > 0

    def read(index: int) -> Example:
        query = queries[int(row_of_query[index])]
        rows, good = (values[offsets[index] : offsets[index + 1]] for values in (row_of_doc, relevant))
        positives, negatives = ([corpus[int(row)] for row in rows[which]] for which in (good, ~good))
        return Example(
            query=query.full_text,
            query_id=query.doc_id,
            positives=tuple(positives),
            negatives=tuple(without_positives(positives, negatives)),
            corpus=str(folder),
        )

    files = [*queries.files, *corpus.files, *qrels_files(folder)[split]]
    return Rows(len(row_of_query), read, lambda index: queries.where(int(row_of_query[index])), files=files)


def is_judged(folder: Path) -> bool:
    """Return True for a folder with a corpus and judgements."""
    return find_part(folder, *CORPUS_NAMES) is not None and bool(qrels_files(folder))


def qrels_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of judgements by split."""
    files: dict[str, list[Path]] = {}
    # On the hub the judgements may be in a folder of any data, which are judgements where there are queries.
    for place in ("qrels", "data", "default") if find_part(folder, "queries") else ("qrels",):
        for file in sorted((folder / place).glob("*")):
            if suffix(file) in (*SUFFIXES, *_TEXT) and not file.name.startswith("."):
                files.setdefault(_SHARD.sub("", file.name.removesuffix(".gz").rpartition(".")[0]), []).append(file)
        if files:
            return files
    for file in sorted(folder.glob("*qrels*")):
        if match := re.fullmatch(r"(?:msmarco-doc)?(?:qrels[.-](.+)|(.+)-qrels)\.(?:tsv|txt|trec)(?:\.gz)?", file.name):
            files.setdefault(match[1] or match[2], []).append(file)
    return files


def open_judged(folder: Path, split: str) -> Judged:
    """Open the corpus, the queries and one split's judgements."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected a folder with {SHAPE}")
    corpus = find_part(folder, *CORPUS_NAMES)
    queries = find_part(folder, f"queries.{split}", f"queries-{split}", f"msmarco-doc{split}-queries", "queries")
    files = qrels_files(folder)
    for name, part in (("corpus.jsonl", corpus), ("queries.jsonl", queries), (f"qrels/{split}.tsv", files)):
        if not part:
            raise ValueError(f"{folder} has no {name} (nor {name}.gz): expected {SHAPE}, found {listing(folder)}")
    if split not in files:
        raise ValueError(f"{folder} has no qrels split {split!r}: it has {sorted(files)}")
    assert queries is not None
    kind = suffix(max(files[split], key=lambda file: suffix(file) == ".tsv"))
    chosen = [file for file in files[split] if suffix(file) == kind]
    rest = [file for file in files[split] if file not in chosen]  # the same judgements, in other kinds of file
    extra = [path for name in _NOT_READ for path in sorted(folder.glob(f"{name}*"))]
    not_read(str(folder), [str(path.relative_to(folder)) for path in (*rest, *extra)])
    documents = open_corpus(corpus)
    asked = open_corpus(queries, split=split if queries.is_dir() and has_split(queries, split) else None)
    return Judged(documents, asked, read_qrels(chosen, asked, documents))


def read_qrels(paths: list[Path], queries: Documents, corpus: Documents) -> Qrels:
    """Read judgements, whose queries must be known; of two grades for one pair the last counts, with a warning."""
    qrels: Qrels = {}
    rows = changed = unknown = 0
    first_changed = first_unknown = ""
    for path in paths:
        for query, document, score, where in _judgements(path):
            rows += 1
            grades = qrels.setdefault(query, {})
            if not grades and queries.row(query) is None:
                raise ValueError(
                    f"{where()}: the query id {query!r:.80} is not in {queries.name}. Expected every query of the "
                    "qrels there: add the record or delete the line."
                )
            if grades.get(document, score) != score:
                changed += 1
                first_changed = first_changed or f"{where()}: {grades[document]}, then {score}"
            if document not in grades and corpus.row(document) is None:
                unknown += 1
                first_unknown = first_unknown or f"{where()}: {document!r:.80}"
            grades[document] = score
    pairs = sum(map(len, qrels.values()))
    if not rows:
        raise ValueError(f"{paths[0]} has no judgements: expected rows of query-id, corpus-id, score")
    if unknown == pairs:
        raise ValueError(
            f"{first_unknown} is not in {corpus.name}, nor is any other judged document: is it that corpus?"
        )
    if changed:
        notice(f"{changed} pairs are judged twice with different scores, of which the last counts ({first_changed})")
    if unknown:
        notice(
            f"{unknown} of {pairs} judged documents are not in {corpus.name} ({first_unknown}): they count as never "
            "found in an evaluation, and are left out in training"
        )
    return qrels


def _judgements(path: Path) -> Iterator[tuple[str, str, int, Callable[[], str]]]:
    """Yield query id, document id, score and place."""
    columns = Columns(JUDGEMENT)
    rows = Lines(path, text_value) if suffix(path) in _TEXT else open_file(path, columns)
    order = [0, 1, 2]
    for index, record in enumerate(rows):
        where = partial(rows.where, index)
        cells = _cells(record, columns)
        text = isinstance(record, str) and len(cells) == 3
        if index == 0 and text and re.fullmatch("[A-Za-z][A-Za-z_ -]*", cells[2]):  # a header
            roles = columns.layout(dict.fromkeys(cells))
            if all(roles[role] for role in JUDGEMENT):  # else the columns are in the usual order
                order = [cells.index(roles[role][0]) for role in JUDGEMENT]
            continue
        cells = [cells[place] for place in order] if len(cells) == 3 else cells
        if len(cells) != 3 or not _SCORE.fullmatch(cells[2]):
            raise ValueError(
                f"{where()}: expected query-id, corpus-id and an integer score (in three tab-separated cells, or under "
                f"these names), found {show(record)}"
            )
        yield cells[0], cells[1], int(cells[2].split(".")[0]), where
    not_read(str(path), columns.all_unread(), ". What is read: query-id, corpus-id and score")


def _cells(record: object, columns: Columns) -> list[str]:
    """Return query id, document id and score, as texts; another number of cells for anything else."""
    if isinstance(record, str):
        cells = [cell.strip() for cell in (record.split("\t") if "\t" in record else record.split())]
        if '"' in record:
            cells = [c[1:-1].replace('""', '"') if len(c) > 1 and c[0] == c[-1] == '"' else c for c in cells]
        return [*cells[:1], *cells[2:]] if len(cells) == 4 else cells  # TREC's second of four says nothing
    if not isinstance(record, dict):
        return []
    layout = columns.layout(record)
    values = [record[name] for role in JUDGEMENT for name in layout[role][:1]]
    return [str(value) for value in values if isinstance(value, (str, int, float)) and not isinstance(value, bool)]
