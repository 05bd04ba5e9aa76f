"""Hard negatives: for each query the documents that score highest and are not known to be relevant.

The search is exact and sharded over the ranks (see `search`). Ranks count only documents that may be negatives: known
positives, texts equal to one, the query itself and blank texts are left out before, and equal texts are one document.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inbatch import collectives
from inbatch.data import load_retrieval, open_examples
from inbatch.data.files import naming, partial, publish, remove, write_json
from inbatch.data.identity import normalised
from inbatch.ids import stable_id
from inbatch.retrieval.evaluate import RetrieveOptions, embed_both
from inbatch.retrieval.search import pair_scores, top_k

FORMATS = ("lists", "triplets")
_QUERIES = 4096  # searched at a time: bounds memory
_EXAMPLES = 20  # shown in the report


@dataclass(frozen=True, kw_only=True)
class MineOptions:
    """Which of the best documents become negatives."""

    num_negatives: int = 5
    """negatives of a query, at most"""
    range_min: int = 0
    """skip this many of the best candidates"""
    range_max: int = 100
    """look at this many of the best candidates"""
    relative_margin: float | None = None
    """a negative scores at most the query's lowest positive score, less this share of its size"""
    absolute_margin: float | None = None
    """a negative scores at most the query's lowest positive score, less this"""
    max_score: float | None = None
    """a negative scores at most this"""
    min_score: float | None = None
    """a negative scores at least this"""
    sampling: str = "top"
    """"top" takes the best that pass, "random" any of them"""
    seed: int = 42
    """of random sampling"""

    def __post_init__(self):
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}; expected at least 1")
        if not 0 <= self.range_min < self.range_max:
            raise ValueError(
                f"range_min is {self.range_min} and range_max {self.range_max}; expected 0 <= range_min < range_max"
            )
        if self.sampling not in ("top", "random"):
            raise ValueError(f"sampling is {self.sampling!r}; expected top or random")


@dataclass(frozen=True, kw_only=True)
class MiningSet:
    """Queries, distinct documents, and for each query the rows of its positives and of documents that it equals."""

    queries: Sequence[str]
    documents: Sequence[str]
    positives: Sequence[Sequence[int]]
    same: Sequence[Sequence[int]]


def open_mining_set(source: str | os.PathLike, split: str = "train") -> MiningSet:
    """Return what to mine: the queries of a BEIR folder's split and its corpus, or training records and their passages.

    Queries without a positive are left out. Records with one query text are one query. Raises ValueError for what
    `open_examples` and `load_retrieval` refuse, and where nothing is left.
    """
    if (Path(source) / "qrels").is_dir():
        data = load_retrieval(source, split)
        rows, keys, texts = _distinct(data.documents)
        row_of = dict(zip(data.doc_ids, rows, strict=True))
        relevant = [
            [row_of[doc] for doc, grade in data.qrels[q].items() if grade > 0 and doc in row_of] for q in data.query_ids
        ]
        queries, own = data.queries, [row_of.get(query_id, -1) for query_id in data.query_ids]
    else:
        found: dict[str, list[str]] = {}
        passages: list[str] = []
        for example in open_examples(source, split=split):
            found.setdefault(example.query, []).extend(passage.full_text for passage in example.positives)
            passages += [passage.full_text for passage in (*example.positives, *example.negatives)]
        _, keys, texts = _distinct(passages)
        queries, own = list(found), [-1] * len(found)
        relevant = [[keys.get(_key(text), -1) for text in positives] for positives in found.values()]
    positives = [sorted({row for row in some if row >= 0}) for some in relevant]
    same = [sorted({row, keys.get(_key(query), -1)} - {-1}) for query, row in zip(queries, own, strict=True)]
    kept = [place for place, some in enumerate(positives) if some]
    if not kept:
        raise ValueError(f"{source}: no query has a positive with a text; expected at least one to mine negatives for")
    return MiningSet(
        queries=[queries[place] for place in kept],
        documents=texts,
        positives=[positives[place] for place in kept],
        same=[same[place] for place in kept],
    )


class _Chosen(Sequence[str]):
    """Some rows of texts that may stay on disk."""

    def __init__(self, texts: Sequence[str], rows: list[int]):
        self._texts, self._rows = texts, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[self._rows[index]]


def _key(text: str) -> int:
    return stable_id("", normalised(text))


def _distinct(texts: Sequence[str]) -> tuple[list[int], dict[int, int], Sequence[str]]:
    """Return each text's row among the distinct ones that are not blank (-1: blank), rows by key, and those texts."""
    blank, keys, rows, first = _key(""), {}, [], []
    for place, text in enumerate(texts):
        key = _key(text)
        if key != blank and key not in keys:
            keys[key] = len(first)
            first.append(place)
        rows.append(keys.get(key, -1))
    return rows, keys, _Chosen(texts, first)


def search_negatives(
    queries: Tensor,
    documents: Tensor,
    data: MiningSet,
    depth: int,
    *,
    similarity: str = "cosine",
    group=None,
) -> Iterator[tuple[range, Tensor, Tensor, list[list[float]]]]:
    """Yield (queries' rows, scores [q, depth], documents' rows [q, depth], positives' scores), some queries at a time.

    queries: [Q, D], the same on every rank. documents: [N, D], this rank's share, in rank order. Every rank gets the
    same. A query with fewer candidates ends in (-inf, -1).
    """
    counts = collectives.agree("the documents", {"documents": documents[:, :0].to(queries.device)}, group=group)
    offset = sum(counts["documents"][: collectives.rank(group)])
    for start in range(0, len(queries), _QUERIES):
        rows = range(start, min(len(queries), start + _QUERIES))
        some = queries[start : rows.stop]
        known = _pairs(data.positives, rows)
        exclude = torch.cat([known, _pairs(data.same, rows)])
        found = top_k(some, documents, depth, similarity=similarity, exclude=exclude, offset=offset, group=group)
        here = ((known[:, 1] >= offset) & (known[:, 1] < offset + len(documents))).nonzero().squeeze(1)
        scores = torch.zeros(len(known), device=queries.device)
        local = known[here] - torch.tensor([0, offset])
        scores[here.to(scores.device)] = pair_scores(some, documents, local, similarity=similarity)
        flat = iter(collectives.all_reduce(scores, group=group).tolist())
        yield rows, found[0].cpu(), found[1].cpu(), [[next(flat) for _ in data.positives[row]] for row in rows]


def _pairs(rows_of: Sequence[Sequence[int]], queries: range) -> Tensor:
    pairs = [(place, row) for place, query in enumerate(queries) for row in rows_of[query]]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


@dataclass(kw_only=True)
class _Report:
    """What became of the candidates."""

    counts: Counter = field(default_factory=Counter)
    positive_scores: list[float] = field(default_factory=list)
    negative_scores: list[float] = field(default_factory=list)
    examples: list[dict] = field(default_factory=list)


def choose(
    query: int, scores: Sequence[float], positive_scores: Sequence[float], options: MineOptions, filtered: Counter
) -> list[int]:
    """Return the places among a query's candidates (best first) that become its negatives, in that order.

    `filtered` counts the candidates that each rule takes out, under the first rule that does.
    """
    lowest = min(positive_scores)
    ceilings = {
        "relative_margin": None if options.relative_margin is None else lowest - options.relative_margin * abs(lowest),
        "absolute_margin": None if options.absolute_margin is None else lowest - options.absolute_margin,
        "max_score": options.max_score,
    }
    passing = []
    for place in range(options.range_min, len(scores)):
        rule = next((name for name, most in ceilings.items() if most is not None and scores[place] > most), None)
        if rule is None and options.min_score is not None and scores[place] < options.min_score:
            rule = "min_score"
        if rule is None:
            passing.append(place)
        else:
            filtered[rule] += 1
    if options.sampling == "random" and len(passing) > options.num_negatives:
        # A function of the seed and the query alone.
        chance = np.random.default_rng([options.seed, query])
        return sorted(chance.choice(passing, options.num_negatives, replace=False).tolist())
    return passing[: options.num_negatives]


def mine(
    model: nn.Module,
    data: MiningSet,
    output: str | os.PathLike,
    options: MineOptions | None = None,
    retrieve: RetrieveOptions | None = None,
    *,
    query_model: nn.Module | None = None,
    format: str = "lists",
    group=None,
) -> dict[str, Any]:
    """Write training records with mined negatives to `output` and return the report, on every rank.

    format: "lists" is a JSON line a query with query, pos, neg, pos_scores and neg_scores; "triplets" a line for each
    of its positives with anchor, positive, negative_1, ... A query with fewer candidates than num_negatives gets
    fewer; the report says how many queries do. Beside it, output + ".report.json" and ".report.png" (scores).

    model, query_model: as `retrieve`, which names prefixes, lengths, similarity and batches. Memory: a share of the
    documents' embeddings a rank, all the queries', and 4096 queries' candidates. The records do not depend on the
    number of ranks, but for rounding in the encoder. Raises ValueError on every rank for what cannot be used.
    """
    options, retrieve, output = options or MineOptions(), retrieve or RetrieveOptions(), Path(output)
    if format not in FORMATS or output.suffix != ".jsonl":
        raise ValueError(f"output {output.name!r} in format {format!r}; expected a .jsonl, in {' or '.join(FORMATS)}")
    similarity, queries, documents = embed_both(
        model, data.queries, data.documents, retrieve, query_model=query_model, group=group
    )
    report, first = _Report(), collectives.rank(group) == 0
    searched = search_negatives(queries, documents, data, options.range_max, similarity=similarity, group=group)

    def write(rows: range, scores: Tensor, indices: Tensor, positive_scores: list[list[float]]) -> None:
        with naming(output), partial(output).open("a", encoding="utf-8") as file:
            for place, row in enumerate(rows):
                some = indices[place][indices[place] >= 0].tolist()
                record = _record(
                    row, data, some, scores[place].tolist()[: len(some)], positive_scores[place], options, report
                )
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(record, format))

    def begin() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove(partial(output))

    try:
        collectives.together(lambda: begin() if first else None, group)
        for found in searched:
            collectives.together(lambda found=found: write(*found) if first else None, group)
        collectives.together(lambda: publish(output) if first else None, group)
    except BaseException:
        if first:
            remove(partial(output))
        raise
    facts = {"similarity": similarity, "documents": len(data.documents), **asdict(options)}
    return collectives.broadcast_object(
        collectives.together(lambda: _write_report(output, report, facts) if first else None, group), group=group
    )  # pyright: ignore[reportReturnType]


def _record(
    row: int, data: MiningSet, candidates: list[int], scores: list[float], positive_scores: list[float],
    options: MineOptions, report: _Report,
) -> dict[str, Any]:  # fmt: skip
    report.counts["queries"] += 1
    report.counts["candidates"] += len(candidates)
    places = choose(row, scores, positive_scores, options, report.counts)
    report.counts["negatives"] += len(places)
    report.counts["queries with fewer negatives"] += len(places) < options.num_negatives
    report.counts["queries without negatives"] += not places
    record = {
        "query": data.queries[row],
        "pos": [data.documents[place] for place in data.positives[row]],
        "neg": [data.documents[candidates[place]] for place in places],
        "pos_scores": positive_scores,
        "neg_scores": [scores[place] for place in places],
    }
    report.positive_scores += record["pos_scores"]
    report.negative_scores += record["neg_scores"]
    if len(report.examples) < _EXAMPLES:
        report.examples.append(record)
    return record


def _lines(record: dict[str, Any], format: str) -> Iterator[dict[str, Any]]:
    if format == "lists":
        yield record
        return
    negatives = {f"negative_{number}": text for number, text in enumerate(record["neg"], 1)}
    for positive in record["pos"]:
        yield {"anchor": record["query"], "positive": positive, **negatives}


def _write_report(output: Path, report: _Report, facts: dict[str, Any]) -> dict[str, Any]:
    from matplotlib.figure import Figure

    scores = {"positives": report.positive_scores, "negatives": report.negative_scores}
    everything = {**facts, "counts": dict(report.counts)}
    write_json(output.with_name(f"{output.name}.report.json"), {**everything, "examples": report.examples})
    axes = (figure := Figure(figsize=(7, 4))).add_subplot(xlabel="score", ylabel="pairs", title=output.name)
    for name, values in scores.items():
        axes.hist(values, bins=60, alpha=0.6, label=f"{name} ({len(values)})")
    axes.legend()
    figure.savefig(output.with_name(f"{output.name}.report.png"), dpi=120)
    return everything
