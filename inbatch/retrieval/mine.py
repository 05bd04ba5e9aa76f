"""Hard negatives: for each query the documents that score highest and are not known to be relevant.

The search is exact and sharded over the ranks (see `search`). Candidates are the documents that may be negatives: known
positives, texts equal to a positive, the query itself and blank texts are left out first, and equal texts are one
document.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from inbatch import collectives
from inbatch.data import load_retrieval, open_examples
from inbatch.data.files import check_output, claimed, naming, partial, publish, remove, sync, write_json
from inbatch.data.identity import normalised
from inbatch.data.judged import is_judged
from inbatch.data.lines import Rows, chosen
from inbatch.data.readers import say_of_prompts
from inbatch.ids import stable_id
from inbatch.losses.max_sim import Tokens
from inbatch.retrieval.embed import share
from inbatch.retrieval.evaluate import RetrieveOptions, embed_documents, embed_queries, similarity_of
from inbatch.retrieval.kept import model_digest, text_digest
from inbatch.retrieval.nearest import Embeddings, counts_by_rank, nearest, scores_of_pairs

FORMATS = ("lists", "triplets")
_QUERIES = 4096  # searched at a time: bounds memory
_PAIRS = 1 << 16  # scored at a time
_EXAMPLES = 20  # shown in the report


@dataclass(frozen=True, kw_only=True)
class MineOptions:
    """Say which of the best documents become negatives."""

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
        if not 0 <= self.range_min < self.range_max:
            raise ValueError(
                f"range_min is {self.range_min} and range_max {self.range_max}; expected 0 <= range_min < range_max"
            )
        candidates = self.range_max - self.range_min
        if not 1 <= self.num_negatives <= candidates:
            raise ValueError(
                f"num_negatives is {self.num_negatives}; expected at least 1, and at most the {candidates} candidates "
                "from range_min to range_max"
            )
        for name in ("relative_margin", "absolute_margin", "max_score", "min_score"):
            if (value := getattr(self, name)) is not None and math.isnan(value):
                raise ValueError(f"{name} is {value}; expected a number")
        if self.relative_margin is not None and abs(self.relative_margin) > 1:
            raise ValueError(f"relative_margin is {self.relative_margin}; expected a share of at most 1, such as 0.05")
        if self.max_score is not None and self.min_score is not None and self.min_score > self.max_score:
            raise ValueError(
                f"min_score is {self.min_score} and max_score {self.max_score}, between which is no score; expected "
                "min_score <= max_score"
            )
        if self.sampling not in ("top", "random"):
            raise ValueError(f"sampling is {self.sampling!r}; expected top or random")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected at least 0")
        if self.seed != MineOptions.seed and self.sampling == "top":
            raise ValueError(f"seed is {self.seed}, which sampling 'top' does not use: set sampling to random")


@dataclass(frozen=True, kw_only=True)
class MiningSet:
    """Queries, distinct documents, and for each query the rows of its positives and of documents that it equals."""

    queries: Sequence[str]
    documents: Sequence[str]
    positives: Sequence[Sequence[int]]
    same: Sequence[Sequence[int]]
    files: Sequence[Path] = ()  # that it is read from


def open_mining_set(source: str | os.PathLike, split: str = "train") -> MiningSet:
    """Return what to mine: queries and corpus of a judged folder's split, or training records and their passages.

    Queries without a positive are left out. Records with one query text are one query. Warns of prompts of the records,
    which are not used. Raises ValueError for what `open_examples` and `load_retrieval` refuse, and where nothing is
    left.
    """
    if Path(source).is_dir() and is_judged(Path(source)):
        data = load_retrieval(source, split)
        rows, keys, texts = _distinct(data.documents)
        row_of = dict(zip(data.doc_ids, rows, strict=True))
        relevant = [
            [row_of[doc] for doc, grade in data.qrels[q].items() if grade > 0 and doc in row_of] for q in data.query_ids
        ]
        files = data.documents.files if isinstance(data.documents, Rows) else ()
        queries, rows_of_ids = data.queries, [row_of.get(query_id, -1) for query_id in data.query_ids]
    else:
        positive_texts: dict[str, list[str]] = {}
        passages: list[str] = []
        examples = open_examples(source, split=split)
        say_of_prompts(examples)
        files = examples.files
        for example in examples:
            of_query = positive_texts.setdefault(example.query, [])
            of_query += [passage.full_text for passage in example.positives]
            passages += [passage.full_text for passage in (*example.positives, *example.negatives)]
        _, keys, texts = _distinct(passages)
        queries, rows_of_ids = list(positive_texts), [-1] * len(positive_texts)
        relevant = [[keys.get(_key(text), -1) for text in of_query] for of_query in positive_texts.values()]
    positives = [sorted({row for row in some if row >= 0}) for some in relevant]
    same = [sorted({row, keys.get(_key(query), -1)} - {-1}) for query, row in zip(queries, rows_of_ids, strict=True)]
    kept = [place for place, some in enumerate(positives) if some]
    if not kept:
        raise ValueError(f"{source}: no query has a positive with a text; expected at least one to mine negatives for")
    return MiningSet(
        queries=[queries[place] for place in kept],
        documents=texts,
        positives=[positives[place] for place in kept],
        same=[same[place] for place in kept],
        files=files,
    )


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
    return rows, keys, chosen(texts, first)


Scores = Callable[[range, Tensor], Tensor]  # (queries' rows, pairs [P, 2]) -> [P] on the CPU, the same on every rank
Found = tuple[range, Tensor, Tensor, list[list[float]]]


def search_negatives(
    rows: range, queries: Embeddings, documents: Embeddings, data: MiningSet, depth: int, *,
    similarity: str = "cosine", scores: Scores | None = None, group=None,
) -> Found:  # fmt: skip
    """Return (rows, scores [q, depth], documents' rows [q, depth], positives' scores) for the queries `rows` of `data`.

    queries: [q, D], the embeddings of these, the same on every rank. documents: [N, D], this rank's share, in rank
    order. scores: scores positives and candidates anew, in place of these embeddings. Every rank returns the same. A
    query with fewer candidates ends in (-inf, -1).
    """
    known = _pairs(data.positives, rows)
    exclude = torch.cat([known, _pairs(data.same, rows)])
    found = nearest(queries, documents, depth, similarity=similarity, exclude=exclude, group=group)
    best, indices = (tensor.cpu() for tensor in found)
    if scores is None:
        of_known = _scored(queries, documents, known, similarity, group)
    else:
        places = (indices >= 0).nonzero()
        candidates = torch.stack([places[:, 0], indices[places[:, 0], places[:, 1]]], dim=1)
        anew = scores(rows, torch.cat([known, candidates]))
        if not anew.isfinite().all():
            raise ValueError("the teacher's scores hold NaN or infinity; expected finite numbers: look at its weights")
        of_known, of_candidates = anew.split([len(known), len(candidates)])
        best = torch.full_like(best, -torch.inf)
        best[places[:, 0], places[:, 1]] = of_candidates
        best, order = best.sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
    flat = iter(of_known.tolist())
    return rows, best, indices, [[next(flat) for _ in data.positives[row]] for row in rows]


def _scored(queries: Embeddings, documents: Embeddings, pairs: Tensor, similarity: str, group) -> Tensor:
    """Return the scores [P] of pairs [P, 2] (row of a query, document), each from the rank that has the document."""
    device = (queries.vectors if isinstance(queries, Tokens) else queries).device
    offset = sum(counts_by_rank("the documents", documents, device, group)[: collectives.rank(group)])
    here = ((pairs[:, 1] >= offset) & (pairs[:, 1] < offset + len(documents))).nonzero().squeeze(1)
    scores = torch.zeros(len(pairs), device=device)
    local = pairs[here] - torch.tensor([0, offset])
    for some, place in zip(local.split(_PAIRS), here.split(_PAIRS), strict=True):
        scores[place.to(device)] = scores_of_pairs(queries, documents, some, similarity=similarity)
    return collectives.all_reduce(scores, group=group).cpu()


def _scores_of(
    teacher: Any, data: MiningSet, retrieve: RetrieveOptions, device: torch.device, *, kept: Path | None, group
) -> Scores:
    """Return the function that scores pairs by a teacher: a bi-encoder, or a model with a method `predict`."""
    if not hasattr(teacher, "predict"):
        usual = RetrieveOptions(embedding=retrieve.embedding)  # prefixes and lengths are the teacher's
        similarity = collectives.together(lambda: similarity_of(teacher, usual), group)
        documents = embed_documents(teacher, data.documents, usual, kept=kept, group=group)

        def score(rows: range, pairs: Tensor) -> Tensor:
            queries = embed_queries(teacher, data.queries[rows.start : rows.stop], usual, group=group)
            return _scored(queries, documents, pairs, similarity, group)

        return score

    def predict(rows: range, pairs: Tensor) -> Tensor:
        mine, scores = share(len(pairs), group), torch.zeros(len(pairs))

        def fill() -> None:
            texts = [(data.queries[rows[q]], data.documents[d]) for q, d in pairs[mine.start : mine.stop].tolist()]
            given = torch.as_tensor(teacher.predict(texts, show_progress_bar=False) if texts else [])
            if given.numel() != len(texts):
                raise ValueError(
                    f"the teacher's scores of {len(texts)} pairs are {tuple(given.shape)}; expected one each"
                )
            scores[mine.start : mine.stop] = given.flatten()

        collectives.together(fill, group)
        return collectives.all_reduce(scores.to(device), group=group).cpu()

    return predict


def _pairs(rows_of: Sequence[Sequence[int]], queries: range) -> Tensor:
    pairs = [(place, row) for place, query in enumerate(queries) for row in rows_of[query]]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


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
    teacher: Any = None,
    kept: str | os.PathLike | None = None,
    format: str = "lists",
    group=None,
) -> dict[str, Any]:
    """Write training records with mined negatives to `output` and return the report, on every rank.

    format: "lists" is a JSON line a query with query, pos, neg, pos_scores and neg_scores; "triplets" a line for each
    of its positives with anchor, positive, negative_1, ... A query with fewer candidates than num_negatives gets
    fewer; the report says how many queries do. Beside it, output + ".report.json" and ".report.png" (scores).

    model, query_model: as `retrieve`, which names prefixes, lengths, similarity and batches. teacher: a BiEncoderModel
    or sentence-transformers CrossEncoder that scores the best range_max and the positives anew, by which they are
    ranked and filtered. kept: a folder where the documents' embeddings stay, for later runs with the same weights,
    texts and settings. The same call continues a run that was killed.

    Memory: a share of the documents' embeddings a rank, and 4096 queries with their candidates. The records do not
    depend on the number of ranks, but for rounding in the encoder. Raises ValueError on every rank for what cannot be
    used.
    """
    options, retrieve, output = options or MineOptions(), retrieve or RetrieveOptions(), Path(output)
    if format not in FORMATS or output.suffix != ".jsonl":
        raise ValueError(f"output {output.name!r} in format {format!r}; expected a .jsonl, in {' or '.join(FORMATS)}")
    if retrieve.top_k != RetrieveOptions.top_k or retrieve.keep_identical_ids:
        raise ValueError(
            "mine takes range_max of MineOptions for top_k, and a query's own document is never a negative: leave out "
            "top_k and keep_identical_ids of RetrieveOptions"
        )
    query_model, folder = model if query_model is None else query_model, None if kept is None else Path(kept)
    device = next(model.parameters()).device
    similarity = collectives.together(lambda: similarity_of(model, retrieve), group)

    def begin() -> int:
        check_output(output, data.files)
        models = [encoder for encoder in (model, query_model, teacher) if encoder is not None]
        digests = [model_digest(m) if isinstance(m, nn.Module) else repr(m) for m in models]
        texts = [text_digest(data.queries), text_digest(data.documents), text_digest(map(str, data.positives))]
        how = replace(retrieve, embedding=replace(retrieve.embedding, progress=None, batch_tokens=None))
        facts = {**asdict(options), "retrieve": str(how), "similarity": similarity, "format": format}
        return written.begin({**facts, "models": digests, "texts": texts})

    written = _Records(output, data, options, format)
    try:
        done = collectives.on_rank_0(begin, group)
        documents = embed_documents(model, data.documents, retrieve, kept=folder, group=group)
        scores = None if teacher is None else _scores_of(teacher, data, retrieve, device, kept=folder, group=group)
        for start in range(done, len(data.queries), _QUERIES):
            rows = range(start, min(len(data.queries), start + _QUERIES))
            queries = embed_queries(query_model, data.queries[start : rows.stop], retrieve, group=group)
            negatives = search_negatives(
                rows, queries, documents, data, options.range_max, similarity=similarity, scores=scores, group=group
            )
            collectives.on_rank_0(lambda negatives=negatives: written.add(*negatives), group)
        return collectives.on_rank_0(lambda: written.finish({"similarity": similarity, **asdict(options)}), group)
    except Exception:
        if written.claim is not None and not written.state.exists():  # else the same call goes on from there
            remove(partial(output))
        raise
    finally:
        if written.claim is not None:
            written.claim.close()


class _Records:
    """Hold the output under its hidden name and, beside it, a file with its inputs and progress, for the next run."""

    def __init__(self, output: Path, data: MiningSet, options: MineOptions, format: str):
        self._output, self._data, self._options, self._format = output, data, options, format
        self.state = output.with_name(f".{output.name}.state.json")
        self.claim: IO | None = None  # while this process fills the output
        self._made_for: dict[str, Any] = {}
        self._counts = Counter()
        # By their first two digits.
        self._scores = {"positives": Counter(), "negatives": Counter()}
        self._examples: list[dict[str, Any]] = []

    def begin(self, made_for: dict[str, Any]) -> int:
        """Return how many queries an earlier run for the same inputs finished; remove what a run for others left."""
        self._made_for = json.loads(json.dumps(made_for))
        with naming(self._output):
            self.claim = claimed(self._output)
            state = json.loads(self.state.read_text()) if self.state.exists() else {}
            if state.get("made for") != self._made_for or self.claim.tell() < state["bytes"]:
                self.claim.truncate(0)
                remove(self.state)
                return 0
            self.claim.truncate(state["bytes"])
        self._counts, self._examples = Counter(state["counts"]), state["examples"]
        self._scores = {name: Counter(of_side) for name, of_side in state["scores"].items()}
        return state["queries"]

    def add(self, rows: range, scores: Tensor, indices: Tensor, positive_scores: list[list[float]]) -> None:
        """Write the records of some queries, then the progress."""
        path = partial(self._output)
        with naming(self._output), path.open("a", encoding="utf-8") as file:
            for place, row in enumerate(rows):
                some = indices[place][indices[place] >= 0].tolist()
                record = self._record(row, some, scores[place].tolist()[: len(some)], positive_scores[place])
                lines = [record] if self._format == "lists" else _triplets(record)
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        sync(path)
        state = {"made for": self._made_for, "queries": rows.stop, "bytes": path.stat().st_size}
        write_json(self.state, {**state, "counts": self._counts, "scores": self._scores, "examples": self._examples})

    def _record(
        self, row: int, candidates: list[int], scores: list[float], positive_scores: list[float]
    ) -> dict[str, Any]:
        self._counts.update(queries=1, candidates=len(candidates))
        places = choose(row, scores, positive_scores, self._options, self._counts)
        self._counts.update({
            "negatives": len(places),
            "queries with fewer negatives": len(places) < self._options.num_negatives,
            "queries without negatives": not places,
        })  # fmt: skip
        record = {
            "query": self._data.queries[row],
            "pos": [self._data.documents[place] for place in self._data.positives[row]],
            "neg": [self._data.documents[candidates[place]] for place in places],
            "pos_scores": positive_scores,
            "neg_scores": [scores[place] for place in places],
        }
        for name, key in (("positives", "pos_scores"), ("negatives", "neg_scores")):
            self._scores[name].update(f"{score:.2g}" for score in record[key])
        if len(self._examples) < _EXAMPLES:
            self._examples.append(record)
        return record

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Give the output its name; write the report and return it."""
        publish(self._output)
        remove(self.state)
        report = {"documents": len(self._data.documents), **facts, "counts": dict(self._counts)}
        write_json(self._output.with_name(f"{self._output.name}.report.json"), {**report, "examples": self._examples})
        _plot(self._scores, self._output)
        return report


def _triplets(record: dict[str, Any]) -> list[dict[str, str]]:
    negatives = {f"negative_{number}": text for number, text in enumerate(record["neg"], 1)}
    return [{"anchor": record["query"], "positive": positive, **negatives} for positive in record["pos"]]


def _plot(scores: dict[str, Counter], output: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4))).add_subplot(xlabel="score", ylabel="pairs", title=output.name)
    for name, counts in scores.items():
        values = [float(score) for score in counts]
        axes.hist(values, bins=60, weights=list(counts.values()), alpha=0.6, label=f"{name} ({counts.total()})")
    axes.legend()
    figure.savefig(output.with_name(f"{output.name}.report.png"), dpi=120)
