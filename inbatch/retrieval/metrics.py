"""Retrieval measures (through ir-measures) and TREC run files.

A run maps a query id to its documents and their scores: {"q1": {"d7": 0.93, "d2": 0.91}}. Documents rank by falling
score; equal scores rank in the order given, which `search.top_k` makes deterministic. Tools of the TREC family break
ties by document id, in either direction, so they get scores without ties.
"""

import difflib
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures import Measure
from ir_measures.measures import registry as _MEASURES
from ir_measures.providers import registry as _PROVIDERS

from inbatch.data.files import replacing
from inbatch.data.records import RetrievalData

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

DEFAULT_MEASURES = ("nDCG@10", "R@100", "RR@10")
TOP_K = 100  # documents retrieved for a query
# Names of other tools, in lower case. Names of ir-measures are found in any case, except Accuracy: `accuracy` is a
# measure of sentence-transformers.
_ALIASES = {"reciprocal_rank": "RR"} | dict.fromkeys(("accuracy", "hit", "hits", "hitrate", "hit_rate"), "Success")
_NAME = re.compile(
    r"\s*(?P<name>\w+?)\s*(?P<options>\(.*\))?\s*(?:(?:@|_at_)\s*(?P<cutoff>\d+(?:\.\d+)?))?\s*", re.ASCII
)


def parse_measure(name: str) -> Measure:
    """Return the ir-measures Measure of a name such as "nDCG@10", "recall@100", "MAP", "P(rel=2)@5", "IPrec@0.1".

    Raises ValueError for a name that is unknown (with the nearest known one), a cut-off that is missing or 0, or a
    measure that no installed package computes.
    """
    # In reverse, since nDCG comes before its other name NDCG.
    known = {known_name.lower(): known_name for known_name in reversed(list(_MEASURES))} | _ALIASES
    match = _NAME.fullmatch(name)
    base = known.get(match["name"].lower()) if match else None
    if match is None or base is None:
        letters, options, digits = re.findall(r"([^\W\d]*)(\(.*\))?\D*(\d*)", name.strip())[0]
        near = difflib.get_close_matches(letters.lower(), known, n=1, cutoff=0.4)
        meant = f"{known[near[0]] if near else 'nDCG'}{options}@{digits or 10}"
        raise ValueError(f"{name!r} is not a measure; did you mean {meant}? Known are {', '.join(sorted(_MEASURES))}")
    base = "Accuracy" if match["name"] == "Accuracy" else base
    cutoff = f"@{match['cutoff']}" if match["cutoff"] else ""
    at_recall = _MEASURES[base].AT_PARAM == "recall"  # a fraction, where others count documents
    example = f"{base}@{0.1 if at_recall else 10}"
    if cutoff and not at_recall and float(match["cutoff"]) < 1:
        raise ValueError(f"measure {name!r} has a cut-off of {match['cutoff']}; expected at least 1, such as {example}")
    try:
        measure = ir_measures.parse_measure(f"{base}{match['options'] or ''}{cutoff}")
        measure.validate_params()
    except (AssertionError, NameError, SyntaxError, TypeError, ValueError) as error:
        hint = str(error) if cutoff else f"it may need a cut-off, as in {example}"
        raise ValueError(f"measure {name!r} is not complete or has an option it does not take: {hint}") from error
    if not any(provider.is_available() and provider.supports(measure) for provider in _PROVIDERS.values()):
        raise ValueError(f"measure {name!r} needs a package that is not installed: see ir-measures' list of providers")
    return measure


def _parse_all(measures: Sequence[str]) -> dict[str, Measure]:
    if isinstance(measures, str) or not measures:
        raise ValueError(f"measures are {measures!r}; expected a list of names, such as {list(DEFAULT_MEASURES)}")
    return {name: parse_measure(name) for name in measures}


def retrieval_metrics(run: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES) -> dict[str, float]:
    """Return each measure, averaged over the queries of `qrels`; keys are the names as given, in that order.

    A query of `qrels` for which nothing was retrieved counts 0. Queries of the run without judgements are left out. A
    measure that cannot be computed on this run is left out with a warning, so that the others are not lost.
    Raises ValueError for an unknown measure, empty qrels, a run that shares no query with them, or no figure at all.
    """
    parsed = _parse_all(measures)
    if not qrels:
        raise ValueError("the qrels are empty: expected {query id: {document id: relevance}}")
    if run and not any(query in run for query in qrels):
        raise ValueError(
            f"no query of the run is judged: the run has ids such as {next(iter(run))!r}, "
            f"the qrels {next(iter(qrels))!r}"
        )
    figures, failures = _compute(run, qrels, parsed)
    if not figures:
        raise ValueError("; ".join(failures))
    for failure in failures:
        warnings.warn(failure, stacklevel=2)
    return figures


def _compute(run: Run, qrels: Qrels, parsed: Mapping[str, Measure]) -> tuple[dict[str, float], list[str]]:
    """Return the figures that can be computed, and for each other measure why it cannot."""
    # Numbers instead of ids, and positions instead of scores: tools differ in the ids they read and in how they sort.
    numbers: dict[str, str] = {}

    def number(name: str) -> str:
        return numbers.setdefault(name, str(len(numbers) + 1))

    judged = {number(query): {number(d): grade for d, grade in grades.items()} for query, grades in qrels.items()}
    positions = {
        number(query): {
            number(document): float(-place) for place, (document, _) in enumerate(_ranked(query, documents))
        }
        for query, documents in run.items()
        if query in qrels
    }
    figures, failures = {}, []
    for name, measure in parsed.items():
        try:
            figures[name] = float(ir_measures.calc_aggregate([measure], judged, positions)[measure])
        except Exception as error:  # whatever one of ten packages raises
            hint = "; sentence-transformers' accuracy@k is Success@k" if measure.NAME == "Accuracy" else ""
            failures.append(f"measure {name!r} cannot be computed on this data ({error or type(error).__name__}){hint}")
    return figures, failures


def _ranked(query: str, documents: Mapping[str, float]) -> list[tuple[str, float]]:
    for document, score in documents.items():
        if math.isnan(score):  # a sort would misplace other documents, too
            raise ValueError(
                f"the score of document {document!r} for query {query!r} is NaN, which has no rank; expected a number: "
                "look at the model, or leave the document out"
            )
    return sorted(documents.items(), key=lambda item: -item[1])  # a stable sort


def write_trec_run(path: str | os.PathLike, run: Run, tag: str = "inbatch") -> None:
    """Write "query Q0 document rank score tag" lines, ranks from 1, readable by trec_eval and ir_measures.

    Scores are float32 with all their digits. Those tools sort by score again and break ties differently, so a score
    that is not below the one before it is lowered to the next float32: the file gives the same figures as the run.
    Raises ValueError for an id or tag that is empty or has white space, and for a score of NaN.
    """
    check_trec_words([tag])
    # A score beyond float32 becomes infinite, and is lowered to the largest float32.
    with np.errstate(over="ignore"), replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for query, documents in run.items():
            check_trec_words([query, *documents])
            below = np.float32(np.inf)
            for rank, (document, score) in enumerate(_ranked(query, documents), start=1):
                below = min(np.float32(score), np.nextafter(below, np.float32(-np.inf)))
                file.write(f"{query} Q0 {document} {rank} {below!s} {tag}\n")


def check_trec_words(words: Iterable[str]) -> None:
    """Raise ValueError for an id or tag that the columns of a run file cannot hold."""
    for word in words:
        if word.split() != [word]:
            raise ValueError(f"{word!r} cannot stand in a TREC run: expected a word without white space")


def check_evaluation(
    data: RetrievalData, measures: Sequence[str], top_k: int | None = None, run_file: bool = False
) -> None:
    """Raise ValueError for mistakes that would otherwise show only after hours of embedding, or of training.

    The measures are tried on a made-up run. top_k: None is that of training, which cannot be set.
    """
    parsed = _parse_all(measures)
    where = f"the {TOP_K} that training retrieves; lower the cut-off, or measure it by `inbatch evaluate --top-k`"
    if top_k is not None:
        where = f"top_k={top_k} retrieves; raise top_k, or lower the cut-off"
    for name, measure in parsed.items():
        if (measure.params.get("cutoff") or 0) > (top_k or TOP_K):
            raise ValueError(f"{name} looks at more documents than {where}")
    for count, ids, what in (
        (len(data.documents), data.doc_ids, "documents"),
        (len(data.queries), data.query_ids, "queries"),
    ):
        if count == 0:
            raise ValueError(f"there are no {what} to evaluate with; expected at least one")
        if count != len(ids):
            raise ValueError(f"there are {count} {what} but {len(ids)} ids; expected one id each")
        if repeated := count - len(set(ids)):
            raise ValueError(f"{repeated} of {count} {what} have the id of another; expected an id of its own for each")
        if run_file:
            check_trec_words(ids)
    judged = {document for documents in data.qrels.values() for document in documents}
    for ids, known, what in ((data.query_ids, data.qrels, "query"), (data.doc_ids, judged, "document")):
        if not any(name in known for name in ids):
            raise ValueError(
                f"the qrels name no {what} of this data: they have {what} ids such as {next(iter(known), None)!r}, "
                f"the data {ids[0]!r}; are they of another collection?"
            )
    if not any(grade > 0 for grades in data.qrels.values() for grade in grades.values()):
        raise ValueError("no score of the qrels is above 0, so nothing is relevant: expected at least one that is")
    if failures := _compute(_made_up_run(data), data.qrels, parsed)[1]:
        raise ValueError("; ".join(failures))
    for name, measure in parsed.items():
        if measure.NAME == "Success" and name.strip().startswith("accuracy"):
            warnings.warn(f"{name} is measured as {measure}, as sentence-transformers means it", stacklevel=2)


def _made_up_run(data: RetrievalData) -> dict[str, dict[str, float]]:
    """Return a run of the data's ids that is right for every query: a relevant document first, then others."""
    run = {}
    for query, grades in data.qrels.items():
        relevant = [document for document, grade in grades.items() if grade > 0][:1]
        others = [document for document in data.doc_ids[:20] if grades.get(document, 0) <= 0]
        run[query] = {document: float(-place) for place, document in enumerate(relevant + others)}
    return run
