"""Training examples from any source: records with their texts, records that name documents by id, judged folders."""

import os
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from inbatch.data.columns import (
    EXAMPLE,
    Columns,
    GivenColumns,
    empty,
    id_text,
    is_conversation,
    listed,
    not_read,
    notice,
    passages,
    show,
    text_of,
)
from inbatch.data.corpus import CORPUS_NAMES, Corpora, Corpus, Documents, corpus_within, key_of, open_corpora, open_once
from inbatch.data.hub import PREFIX, open_hub
from inbatch.data.identity import apart, distinct, id_pairs, merged, without_positives
from inbatch.data.index import Arrays
from inbatch.data.judged import is_judged, judged_examples, open_judged
from inbatch.data.lines import Rows, Where, chosen, joined, scanned
from inbatch.data.records import Example, Passage
from inbatch.data.tables import find_files, find_part, is_datasets_folder, name_of, open_json, open_table, suffix
from inbatch.ids import stable_id

_SCORES = ("positive_scores", "negative_scores", "scores")
SETTINGS = ("path", "num_samples", "split", "columns", "corpus")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One opened source: its examples, which columns hold what (None: a judged folder), and `id_texts` of its ids.

    also: other files that examples are read from; None if some of it is not in files.
    """

    name: str
    examples: Rows[Example]
    columns: Columns | None = None
    also: Sequence[Path] | None = ()
    id_texts: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))


class Examples(Rows[Example]):
    """The training examples of all sources, one after the other.

    `same` maps the keys of texts that share an id to one of them, for the collator; `sources` is what was recognised.
    """

    def __init__(self, sources: Sequence[Source], same: Mapping[int, int]):
        rows = joined([source.examples for source in sources])
        super().__init__(len(rows), rows.__getitem__, rows.where, files=rows.files)
        self.sources, self.same = sources, same


def open_examples(
    sources: Any,
    *,
    split: str = "train",
    columns: GivenColumns | None = None,
    corpus: Any = None,
    seed: int = 42,
) -> Examples:
    """Open the training examples of one or several sources, one after the other, with random access.

    A source is a file, folder or glob of records, hf://owner/name[/subset] on the hub, a judged folder (BEIR and the
    like), of which `split` is read, a sequence of mappings such as a `datasets.Dataset`, or a mapping {path,
    num_samples, split, columns, corpus} of a source and its settings; docs/formats.md lists the formats. Columns are
    found by their usual names, or by `columns` (our field -> column) in the sources that have them. `corpus`: the place
    of documents that records name by id, if it is not beside the records. `num_samples` examples of a source are drawn
    by `seed`.

    Examples are parsed on access; memory holds their places in the file (about 4 bytes each), not their texts. Opening
    reads everything once, and raises ValueError, naming file and place, for any mistake. Warnings name what is not
    used: columns, files, negatives that equal a positive, judged documents that are in no corpus.
    """
    asked = [_settings(source, split, columns, corpus) for source in _listed(sources)]
    if not asked:
        raise ValueError("no training data given: expected one or more files or folders")
    corpora: Corpora = {}
    opened = [_open(settings, corpora, seed) for settings in asked]
    _check_given([source.columns for source in opened], opened[0].name, columns)
    for source, given in zip(opened, asked, strict=True):
        if given["columns"] and given["columns"] is not columns:
            for described in _check_judged([source.columns], source.name, given["columns"]):
                for column, role in described.missing().items():
                    notice(
                        f"{source.name}: columns names {column!r} for {role!r}, but no record has it: it is not used"
                    )
    for name in dict.fromkeys(key_of(given["corpus"]) for given in asked if given["corpus"] is not None):
        if name not in corpora:
            notice(f"the corpus {name} is not used: no record names documents by id")
    return Examples(opened, merged(np.concatenate([source.id_texts for source in opened])))


def say_of_prompts(examples: Examples) -> None:
    """Warn, for what embeds texts alone, if records have prompts of their own."""
    for source in examples.sources:
        first = source.examples[0]
        column = source.columns is not None and "prompt" in source.columns.roles.values()
        if column or first.query_prefix or first.passage_prefix:
            notice(
                f"{source.name}: the prompts of the records are not used: texts are embedded after the model's, or "
                "those given"
            )


def _listed(sources: Any) -> list[Any]:
    """Return a list of sources, from one source or several."""
    if not isinstance(sources, (list, tuple)):
        return [sources]
    first = sources[0] if sources else None
    records = isinstance(first, Mapping) and "path" not in first and not hasattr(first, "column_names")
    return [sources] if records else list(sources)


def _settings(source: Any, split: str, columns: GivenColumns | None, corpus: Any) -> dict[str, Any]:
    given = source if isinstance(source, Mapping) and "path" in source else {"path": source}
    if unknown := [key for key in given if key not in SETTINGS]:
        raise ValueError(f"a source has the unknown settings {unknown}: expected {list(SETTINGS)}")
    number = given.get("num_samples")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"{given['path']}: num_samples is {number!r}, expected a whole number of at least 1")
    return {"split": split, "columns": columns, "corpus": corpus, "num_samples": None} | dict(given)


def _open(asked: Mapping[str, Any], corpora: Corpora, seed: int) -> Source:
    place, corpus_id = asked["path"], None
    if isinstance(place, str) and place.startswith(PREFIX):
        place, corpus_id = open_hub(place, asked["split"], corpora)
    elif isinstance(place, (str, os.PathLike)):
        place = Path(place)
    if isinstance(place, Path) and place.is_dir() and is_judged(place):
        examples = judged_examples(place, open_judged(place, asked["split"]), asked["split"])
        source = Source(name=str(place), examples=examples)
    else:
        source = _open_records(place, asked, corpora, corpus_id)
    return replace(source, examples=_sampled(source, asked["num_samples"], seed))


class _Lookup:
    """Documents, and queries, that the records of a source name by id: opened when the first record does so."""

    def __init__(self, name: str, asked: Mapping[str, Any], folder: Path | None, corpora: Corpora):
        self._name, self._corpora = name, corpora
        self._corpus = asked["corpus"] if asked["corpus"] is not None else folder and find_part(folder, *CORPUS_NAMES)
        self.queries = folder and find_part(folder, f"queries.{asked['split']}", "queries")
        # The corpora of a corpus-id file, which names all documents by id; each record names its corpus.
        self.by_id: list[str] | None = None

    @property
    def parts(self) -> list[Path]:
        """Return the files and folders that hold no records."""
        return [Path(part) for part in (self._corpus, self.queries) if isinstance(part, (str, os.PathLike))]

    @property
    def files(self) -> list[Path] | None:
        """Return the files of documents and queries; None if not all are in files."""
        if self.by_id is not None:
            return [file for name in self.by_id for file in self._corpora[name].documents.files]
        if self._corpus is not None and not isinstance(self._corpus, (str, os.PathLike)):
            return None
        places = [corpus_within(part) for part in self.parts]
        if any(map(is_datasets_folder, places)):
            return None
        return [file for place in places for file in find_files(place, None)]

    def open_for(self, record: Any, columns: Columns) -> None:
        """Open what a first record names by id, before several processes would do so each."""
        if self.by_id is None and isinstance(record, Mapping):
            layout = columns.layout(record)
            if self._corpus is not None and any(not empty(record[column]) for column in layout["positive_ids"]):
                open_once(self._corpus, self._corpora)
            if self.queries is not None and not layout["query"]:
                open_once(self.queries, self._corpora)

    def corpus(self, given: str | None, where: Where) -> tuple[str, Corpus]:
        """Return name and documents of the corpus of a record whose corpus_id is `given`."""
        if self.by_id is not None:
            name = self.by_id[0] if given is None and len(self.by_id) == 1 else given
            if name not in self.by_id:
                raise ValueError(f"{where()}: corpus_id is {given!r:.80}, but the file's corpora are {self.by_id}")
            return name, self._corpora[name]
        if self._corpus is None:
            raise ValueError(
                f"{where()}: the record names documents by id, but no corpus is given or lies beside {self._name}: put "
                "corpus.jsonl there, or name one by `corpus`"
            )
        return open_once(self._corpus, self._corpora)

    def query(self, query_id: str | None, where: Where) -> str:
        """Return the text of a query that a record names by id alone."""
        found = self.queries and open_once(self.queries, self._corpora)[1].documents.find(query_id)
        if not found:
            raise ValueError(
                f"{where()}: the query {query_id!r:.80} has no text, and is in no queries beside {self._name}: put "
                "queries.jsonl there, or the text in the record"
            )
        return found.full_text


def _open_records(place: Any, asked: Mapping[str, Any], corpora: Corpora, corpus_id: str | None) -> Source:
    columns, name = Columns(EXAMPLE, asked["columns"]), name_of(place)
    folder = None if not isinstance(place, Path) else place if place.is_dir() else place.parent
    lookup = _Lookup(name, asked, folder, corpora)
    if isinstance(place, Path) and place.is_file() and suffix(place) == ".json":
        rows, named = open_json(place)
        lookup.by_id = None if named is None else open_corpora(place, named, corpora)
        if not len(rows):
            raise ValueError(f"{place} is empty: expected records")
    else:
        rows = open_table(place, columns, asked["split"], lookup.parts)
        lookup.by_id = None if corpus_id is None else [corpus_id]

    lookup.open_for(rows[0], columns)

    def read(index: int) -> Example:
        return _example(rows[index], columns, lookup, name, partial(rows.where, index))

    found, lacking = _survey(rows, name, columns, lookup)
    examples = Rows(len(rows), read, rows.where, files=rows.files, nbytes=rows.nbytes)
    if len(lacking):
        notice(f"{name}: {len(lacking)} of {len(rows)} records have no positive, as DPR's may, and are left out")
        examples = chosen(examples, np.delete(np.arange(len(rows)), lacking))
    if not len(examples):
        raise ValueError(f"{name}: no record has a positive: expected at least one in positive_ctxs")
    return Source(name=name, examples=examples, columns=columns, also=lookup.files, id_texts=found)


def _example(record: Any, columns: Columns, lookup: _Lookup, name: str, where: Where) -> Example:
    if lookup.by_id is None and (plain := _plain(record, columns)):
        query, positives, negatives, prompt, scores = plain
        return Example(
            query=query,
            positives=tuple(map(Passage, positives)),
            negatives=tuple(map(Passage, negatives)),
            corpus=name,
            query_prefix=prompt,
            scores=tuple(scores),
        )
    if not isinstance(record, Mapping):
        raise ValueError(f"{where()}: expected an object with named columns, found {type(record).__name__}")
    full = {role: [c for c in names if not empty(record[c])] for role, names in columns.layout(record).items()}
    query_id, corpus = (
        next((id_text(record[c], c, where) for c in full[role]), None) for role in ("query_id", "corpus")
    )
    prompt = next((record[c] for c in columns.layout(record)["prompt"]), None)  # "" stands for no instruction
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where()}: expected a text as the query's prompt, found {show(prompt)}")
    query = _query(record, full, query_id, columns, lookup, where)
    found: dict[str, list[Passage]] = {}
    instructions: Corpus | None = None
    positive = None
    for role in ("positive", "negative"):
        by_text, by_id = full[role], full[f"{role}_ids"]
        if lookup.by_id is not None:
            by_text, by_id = [], by_text
        if by_text or not by_id:
            columns.leave(by_id)
            if role == "positive":
                by_text = columns.one_of(record, role, where)
            found[role] = [p for c in by_text for p in passages(record.get(c), c, columns, where)]
        else:
            corpus, instructions = lookup.corpus(corpus, where)
            found[role] = [p for c in by_id for p in _by_id(record[c], c, instructions.documents, corpus, where)]
        positive = positive or (by_text or by_id)[0]
    if not found["positive"]:
        raise ValueError(
            f"{where()}: the record has no positive: its {positive!r} is missing or empty. Expected at least one: "
            "complete the record or delete it."
        )
    scores = _scores(record, full, found, columns, where)
    negatives = without_positives(found["positive"], found["negative"])
    if scores and len(negatives) < len(found["negative"]):
        kept, of_positives = set(negatives), len(found["positive"])
        others = zip(found["negative"], scores[of_positives:], strict=True)
        scores = [*scores[:of_positives], *(score for passage, score in others if passage in kept)]
    return Example(
        query=query,
        query_id=query_id,
        positives=tuple(found["positive"]),
        negatives=tuple(negatives),
        corpus=corpus or name,
        query_prefix=prompt if prompt is not None or instructions is None else instructions.query_prefix,
        passage_prefix=None if instructions is None else instructions.passage_prefix,
        scores=tuple(scores),
        left_out=len(found["negative"]) - len(negatives),
    )


def _scores(
    record: Mapping, full: Mapping, found: Mapping[str, list[Passage]], columns: Columns, where: Where
) -> list[float]:
    """Return a teacher's scores of the positives, then of the negatives; none, with a note, if some are missing.

    A list of labels may instead hold the margins between the scores of the positive and of each negative, which give
    the same softmax.
    """
    positives, negatives = (len(found[role]) for role in ("positive", "negative"))
    names = {role: full[role][0] for role in _SCORES if full[role]}
    of_positives, of_negatives, of_both = (_numbers(record.get(names.get(role))) for role in _SCORES)
    if len(of_both) == positives + negatives:
        columns.leave([name for role, name in names.items() if role != "scores"])
        return of_both
    if of_both and (positives, negatives) == (1, len(of_both)):
        return [0.0, *(-margin for margin in of_both)]
    fits = (len(of_positives), len(of_negatives)) == (positives, negatives)
    for role, name in names.items():
        if name in columns.given.get(role, ()) and not fits:
            raise ValueError(
                f"{where()}: expected in {name!r} a finite number for each passage, of {positives} positives and "
                f"{negatives} negatives, found {show(record[name])}"
            )
    columns.leave([name for role, name in names.items() if role == "scores" or not fits])
    return [*of_positives, *of_negatives] if fits else []


def _numbers(value: Any) -> list[float]:
    """Return the numbers of a list that are finite in float32; none for anything else."""
    if type(value) is not list or not set(map(type, value)) <= {int, float}:
        return []
    return list(map(float, value)) if all(abs(number) < 1e30 for number in value) else []


def _lacks_positive(record: Any, columns: Columns) -> bool:
    """Return True for a DPR record whose search found no positive: its trainer leaves such records out."""
    return (
        isinstance(record, Mapping)
        and record.get("positive_ctxs") == []
        and columns.layout(record)["positive"] == ["positive_ctxs"]
    )


def _plain(record: Any, columns: Columns) -> tuple[str, list[str], list[str], str | None, list[float]] | None:
    """Return (query, positives, negatives, prompt, scores) of a record of texts alone, without fault and without ids.

    None says nothing: `_example` reads the record. This takes a tenth of its time, and serves most records there are.
    """
    if type(record) is not dict:
        return None
    names = tuple(record)
    if names not in columns.plain:
        columns.plain[names] = _plain_columns(columns.layout(record), columns.given)
    if columns.plain[names] is None:
        return None
    query, positive, negative, prompts, scored, rest = columns.plain[names]
    if rest:
        columns.layout(record)  # notes what is not read
    text, texts = record[query], _texts(record[positive])
    others = _texts(record[negative]) if negative is not None else []
    if not texts or others is None or type(text) is not str or not text or text.isspace():
        return None
    for column in prompts:
        if record[column] is not None and type(record[column]) is not str:
            return None
    scores: list[float] = []
    if scored:
        by_column = [_numbers(record[column]) for column in scored]
        if list(map(len, by_column)) != [len(texts), len(others)]:
            return None
        scores = [score for some in by_column for score in some]
    if others and not apart(texts, others):
        return None
    return text, texts, others, record[prompts[0]] if prompts else None, scores


def _plain_columns(
    layout: Mapping[str, list], given: Mapping[str, list]
) -> tuple[str, str, str | None, list[str], list[str], list[str]] | None:
    """Return the columns of query, positive, negative, prompts, scores, and of no role; None where others count too."""
    queries, positives, negatives = (layout[role] for role in ("query", "positive", "negative"))
    if not (
        len(queries) == len(positives) == 1 >= len(negatives)
        and given.get("query", queries) == queries
        and given.get("positive", positives) == positives
        and not any(layout[role] for role in ("query_id", "positive_ids", "negative_ids", "corpus", "label", "scores"))
    ):
        return None
    scored = [column for role in _SCORES for column in layout[role]]
    return queries[0], positives[0], negatives[0] if negatives else None, layout["prompt"], scored, layout[""]


def _texts(value: Any) -> list[str] | None:
    """Return the texts of a column; None where one is blank or something else."""
    texts = value if type(value) is list else [] if value is None or value == "" else [value]
    for text in texts:
        if type(text) is not str or not text or text.isspace():
            return None
    return texts


def _query(
    record: Mapping, full: Mapping, query_id: str | None, columns: Columns, lookup: _Lookup, where: Where
) -> str:
    layout = columns.layout(record)
    by_id = lookup.queries is not None or not (layout["query"] or layout[""])
    if not full["query"] and query_id is not None and by_id:
        return lookup.query(query_id, where)
    column = columns.one_of(record, "query", where)[0]
    text = text_of(record.get(column))
    if text is None or not text.strip():
        why = ": one message is read, not a conversation of several" if is_conversation(record.get(column)) else ""
        raise ValueError(f"{where()}: expected the query's text in {column!r}, found {show(record.get(column))}{why}")
    return text


def _by_id(value: Any, column: str, documents: Documents, corpus: str, where: Where) -> Iterator[Passage]:
    for item in value if isinstance(value, (list, tuple)) else [value]:
        given = item.get("id") if isinstance(item, Mapping) else item
        passage = documents.find(id_text(given, column, where))
        if passage is None:
            raise ValueError(
                f"{where()}: {column} names the document {given!r:.80}, which is not in corpus {corpus!r}. Expected "
                "ids of that corpus: add the document or delete the reference."
            )
        yield passage


def _survey(rows: Rows[Any], name: str, columns: Columns, lookup: _Lookup) -> tuple[np.ndarray, np.ndarray]:
    """Parse every record once: report faults before the run, and name columns that are not read.

    Return the ids with their texts, int64 [n, 2], and the rows of records to be left out.
    """

    def visit(some: Iterator[tuple[Any, Where]]) -> Arrays:
        left_out, own, other, lacking, number = 0, array("q"), array("q"), array("q"), -1
        for number, (record, where) in enumerate(some):
            if lookup.by_id is None and _plain(record, columns):
                continue
            if _lacks_positive(record, columns):
                lacking.append(number)
                continue
            example = _example(record, columns, lookup, name, where)
            left_out += example.left_out > 0
            if example.corpus == name:  # the name of a file may change while what is kept of it stays
                own.extend(id_pairs(replace(example, corpus="")))
            else:
                other.extend(id_pairs(example))
        seen = columns.seen()
        return {
            "left_out": np.array([left_out]), "columns": seen, "own": distinct(own), "other": distinct(other),
            "lacking": np.array(lacking, np.int64), "counts": np.array([[number + 1, len(lacking)]]),
        }  # fmt: skip

    found = scanned(rows, "training examples", (columns.given, lookup.by_id), visit, also=lookup.files)
    columns.learn(found["columns"])
    columns.check_given()
    if not len(found["own"]) and not len(found["other"]):  # then corpus_id says nothing, whatever it holds
        columns.leave([column for column, role in columns.roles.items() if role == "corpus"])
    not_read(name, columns.all_unread(), ". Name what is to be read by columns, such as columns: {negative: <column>}")
    if left_out := int(found["left_out"].sum()):
        notice(
            f"{name}: {left_out} of {len(rows)} records ({left_out / len(rows):.1%}) have a negative that equals one "
            "of their positives. Those negatives are left out; mine again with the known positives excluded."
        )
    own = found["own"] ^ np.array([stable_id("corpus", name), 0])
    counts, lacking_of_part = found["counts"].T  # of each part that was visited
    first_of_part = np.cumsum(counts) - counts
    return np.concatenate([own, found["other"]]), found["lacking"] + np.repeat(first_of_part, lacking_of_part)


def _sampled(source: Source, number: int | None, seed: int) -> Rows[Example]:
    examples = source.examples
    if number is not None and number > len(examples):
        notice(f"{source.name}: num_samples is {number}, but there are {len(examples)}: all are taken")
    if number is None or number >= len(examples):
        return examples
    return chosen(examples, np.array(random.Random(seed).sample(range(len(examples)), number)))


def _check_given(opened: Sequence[Columns | None], name: str, columns: GivenColumns | None) -> None:
    """Raise ValueError for a given column that no source has."""
    read = _check_judged(opened, name, columns)
    for column, role in read[0].missing().items() if read else ():
        if all(column in described.missing() for described in read):
            present = list(dict.fromkeys(n for described in read for n in (*described.roles, *described.unread)))
            raise ValueError(f"{name}: columns names {column!r} for {role!r}, but the columns are {listed(present)}")


def _check_judged(opened: Sequence[Columns | None], name: str, columns: GivenColumns | None) -> list[Columns]:
    """Return the columns of what is read by them; ValueError for columns given where there are judged folders alone."""
    read = [described for described in opened if described is not None]
    if columns and not read:
        raise ValueError(
            f"{name} is a judged folder, whose columns are fixed: leave `columns` out (got {dict(columns)})"
        )
    return read
