"""A look at a run before it starts: what its data hold, what its batches will be, and what looks wrong.

Nothing is trained. Texts are tokenised and batches are drawn from a bounded sample, spread evenly, so that it takes
seconds. `LEVELS` lists what is looked for: an error is a run that will hardly do what was meant.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from inbatch.data import Collator, Mixture, Passage, load_retrieval
from inbatch.data.describe import spread
from inbatch.data.identity import normalised, passage_key, query_key
from inbatch.data.plan import share
from inbatch.data.readers import Examples
from inbatch.encoder.model import BiEncoderModel
from inbatch.train import report
from inbatch.train.boards import check_loggers
from inbatch.train.config import Config
from inbatch.train.report import FirstBatch
from inbatch.train.setup import (
    build_collators,
    build_loss,
    check_candidates,
    check_scores,
    open_evaluation,
    open_training_data,
    open_validation,
    plan_mixture,
)
from inbatch.train.towers import open_towers

TEXTS, ROWS, LEAKS = 2000, 20_000, 100_000  # examples tokenised a source, put into batches, compared with held-out ones
GIB = 2**30

LEVELS = {
    "unnormalised": "error",  # with a temperature for unit vectors
    "temperature": "error",  # of unit vectors, too high for any contrast
    "detached": "error",  # negatives of other ranks, without their gradient
    "learning_rate": "error",  # orders of magnitude off
    "memory": "error",  # more than the GPU has
    "duplicates": "error",  # unmasked
    "truncation": "error",  # most texts lose more than half
    "same_text": "error",  # query and positive
    "prompt_twice": "error",  # in the texts already
    "no_candidates": "error",  # negatives: own, and none
    "hardness": "error",  # of hard negatives, and none
    "leaked_queries": "error",  # more than 1 % of them are training queries
    "some_leaked_queries": "warning",
    "leaked_documents": "warning",
    "masked": "warning",  # so many duplicates that batches are much smaller than they look
    "some_truncation": "warning",
    "prompt_missing": "warning",
    "negative_is_positive": "warning",
    "repeated": "warning",  # pairs
    "too_few_negatives": "warning",  # for train_n_passages
    "grades": "warning",  # above 1, which count as 1
    "few_candidates": "warning",
    "accumulation": "warning",
    "local_negatives": "warning",
    "similarity": "warning",
    "warm_up": "warning",  # for most of the run
    "not_used": "warning",  # whatever the readers leave
    "gpus": "warning",  # that stand idle
    "micro_batch": "warning",  # that cuts nothing
}

# What the authors of widely used models put before texts, by a part of the name; their folders do not say it.
_PROMPTS = {"e5": ("query: ", "passage: "), "nomic-embed": ("search_query: ", "search_document: ")}


class Finding(NamedTuple):
    """Hold something that looks wrong: its name in LEVELS, and a line that says what to do."""

    code: str
    text: str

    @property
    def level(self) -> str:
        return LEVELS[self.code]


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Hold what a sample of a source says. tokens: by side, of each text uncut; shares are of the sample's examples."""

    name: str
    examples: int
    sample: int
    tokens: Mapping[str, np.ndarray]
    limits: Mapping[str, int]
    policy: str
    positives: list[int]
    negatives: list[int]
    taken: int | None
    left_out: float
    same_text: float
    repeated: float
    prompted: Mapping[str, float]

    def truncated(self, side: str) -> float:
        """Return the share of texts that are longer than their limit."""
        return float((self.tokens[side] > self.limits[side]).mean())


class BatchFacts(NamedTuple):
    """Hold the queries of some batches: source, candidates (the positive included), copies of the positives there."""

    sources: np.ndarray
    candidates: np.ndarray
    copies: np.ndarray
    first: FirstBatch


@dataclass(frozen=True, kw_only=True)
class Check:
    """Hold the report on a run."""

    findings: list[Finding]
    sources: list[SourceFacts]
    batches: BatchFacts
    lines: list[str]
    memory: Mapping[str, float]  # GiB of a rank


def check(config: Config, *, ranks: int = 1) -> Check:
    """Return what there is to say about a run of so many ranks; ValueError for what training would refuse."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_loggers(config.train.loggers)
        examples = open_training_data(config)
        check_scores(config, examples)
        held_out = open_validation(config)
        open_evaluation(config.eval)
    model = next(iter((towers := open_towers(config)).values()))
    # Kernels may be for the GPUs of another machine.
    build_loss(replace(config.loss, impl="auto"), model.embedding_dim, torch.device("cpu"))
    plan = plan_mixture(config, examples)
    # Tokens are not kept: the run makes them at its own lengths.
    plain = replace(config, data=replace(config.data, token_cache=False))
    collators = build_collators(plain, model, examples, config.data.sources, repeats=False)
    sources = [
        _source_facts(source.name, source.examples, collator, model)
        for source, collator in zip(examples.sources, collators, strict=True)
    ]
    batches = _batch_facts(config, examples, plan, collators, sources, ranks)
    steps = config.train.max_steps or plan.steps_per_epoch * config.train.epochs
    memory = _memory(config, list(towers.values()), batches.first, ranks)
    lines = [
        f"{steps} steps, {plan.steps_per_epoch} an epoch, {ranks} rank{'s' * (ranks > 1)}",
        *report.mixture(config, plan),
        *report.candidates(config, batches.first, plan),
        "memory of a rank, GiB: " + ", ".join(f"{what} {gib:.2f}" for what, gib in memory.items()),
    ]
    findings = [
        *(Finding("not_used", text) for text in dict.fromkeys(str(warning.message) for warning in caught)),
        *_about_settings(config, model, batches, steps, memory),
        *(finding for facts in sources for finding in _about_source(facts, model, config)),
        *_about_batches(config, batches),
        *_about_candidates(config, examples),
        *_about_grades(examples, config),
        *_leaks(config, examples, held_out),
    ]
    order = list(LEVELS)
    findings = sorted(findings, key=lambda finding: order.index(finding.code))
    return Check(findings=findings, sources=sources, batches=batches, lines=lines, memory=memory)


# ---- facts


def _source_facts(name: str, examples: Any, collator: Collator, model: BiEncoderModel) -> SourceFacts:
    sample = examples[:: max(1, len(examples) // TEXTS)]
    prefixes = {"query": collator.query_prefix, "passage": collator.passage_prefix}
    texts = {
        "query": [example.query for example in sample],
        "passage": [passage.full_text for example in sample for passage in collator.passages(example, 0)],
    }
    pairs = Counter((query_key(example), passage_key(example.positives[0])) for example in sample)
    same = [any(normalised(e.query) == normalised(p.full_text) for p in e.positives) for e in sample]
    return SourceFacts(
        name=name,
        examples=len(examples),
        sample=len(sample),
        tokens={
            side: np.array([len(row) for row in model.token_ids([prefixes[side] + t for t in some], None)])
            for side, some in texts.items()
        },
        limits={"query": collator.query_max_len, "passage": collator.passage_max_len},
        policy=collator.negatives,
        positives=[len(example.positives) for example in sample],
        negatives=[len(example.negatives) for example in sample],
        taken=collator.train_n_passages,
        left_out=float(np.mean([example.left_out > 0 for example in sample])),
        same_text=float(np.mean(same)),
        repeated=1 - len(pairs) / len(sample),
        prompted={
            side: float(np.mean([text.startswith(prefix.strip()) for text in texts[side]])) if prefix.strip() else 0.0
            for side, prefix in prefixes.items()
        },
    )


def _batch_facts(
    config: Config,
    examples: Examples,
    plan: Mixture,
    collators: Sequence[Collator],
    sources: list[SourceFacts],
    ranks: int,
) -> BatchFacts:
    size, parts = config.train.global_batch_size, config.train.accumulation_steps
    count = min(plan.steps_per_epoch, max(1, ROWS // size), 32)
    together = 1 if config.loss.negatives != "local" else ranks
    counts: list[tuple[int, int, int]] = []
    first: list[tuple[int, Collator, Any, int]] = []
    for step in range(0, plan.steps_per_epoch, max(1, plan.steps_per_epoch // count))[:count]:
        rows = plan.rows(step)
        drawn = [
            (int(source), collators[source], examples[int(example)], int(epoch))
            for example, source, epoch in zip(rows.examples, rows.sources, rows.passes, strict=True)
        ]
        for part in range(parts):
            of_part = share(len(drawn), part, parts)
            groups = [[drawn[of_part[row]] for row in share(len(of_part), r, together)] for r in range(together)]
            counts += [row for group in groups for row in _seen(group, masked=config.loss.mask_duplicates)]
            if step == part == 0:
                first = [drawn[row] for row in of_part]
    copies = [copies for _, _, copies in _seen(first, masked=False)]
    widths = [len(collator.passages(example, epoch)) for _, collator, example, epoch in first]
    shares = [share(len(first), rank, ranks) for rank in range(ranks)]
    queries, passages = [len(rows) for rows in shares], [sum(widths[row] for row in rows) for rows in shares]
    usual = sources[0]
    mean = {side: tokens.clip(max=usual.limits[side]).mean() for side, tokens in usual.tokens.items()}
    tokens = queries[-1] * mean["query"] + passages[-1] * mean["passage"]  # the last rank has the most rows
    duplicates = sum(copy > 0 for copy in copies) / max(1, len(copies))
    first_batch = FirstBatch(queries=queries, passages=passages, duplicates=duplicates, tokens=int(tokens))
    return BatchFacts(*np.array(counts, dtype=np.int64).T, first=first_batch)


def _seen(group: Sequence[tuple[int, Collator, Any, int]], *, masked: bool | str) -> list[tuple[int, int, int]]:
    """Return (source, candidates, copies of its positives among them) for the queries that see one another."""
    keys = [[c.key(passage_key(p)) for p in c.passages(example, epoch)] for _, c, example, epoch in group]
    queries = [c.key(query_key(example)) for _, c, example, _ in group]
    everything, firsts = Counter(key for row in keys for key in row), Counter(row[0] for row in keys)
    by_query: dict[int, list[int]] = {}
    for query, row in zip(queries, keys, strict=True):
        by_query.setdefault(query, []).append(row[0])
    result = []
    for (source, collator, example, _), row, query in zip(group, keys, queries, strict=True):
        known = {collator.key(passage_key(passage)) for passage in example.positives}.union(by_query[query])
        among = {"all": everything, "positives": firsts, "own": Counter(row[:1])}[collator.negatives]
        width = among.total() + (0 if collator.negatives == "all" else len(row) - 1)
        copies = sum(among[key] for key in known) - 1
        left_out = among[row[0]] - 1 if masked == "positive" else copies if masked else 0
        result.append((source, width - left_out, copies))
    return result


def _memory(config: Config, towers: Sequence[BiEncoderModel], first: FirstBatch, ranks: int) -> dict[str, float]:
    """Return an estimate of what a rank holds, in GiB."""
    weights = sum(p.numel() for tower in towers for p in tower.parameters())
    trained = sum(p.numel() for tower in towers for p in tower.parameters() if p.requires_grad)
    parts = ranks if config.train.parallel == "fsdp2" else 1
    texts = sum(first.passages) + sum(first.queries) if config.loss.negatives == "gather" else first.passages[-1] * 2
    per_text = 1 if towers[0].multi_vector is None else first.tokens / max(1, first.passages[-1] + first.queries[-1])
    shape = getattr(towers[0].backbone, "config", None)
    width, layers = getattr(shape, "hidden_size", 0), getattr(shape, "num_hidden_layers", 0)  # 0: no transformer
    budget = config.train.micro_batch_tokens
    tokens = first.tokens if budget is None else min(first.tokens, 16384 if budget == "auto" else budget)
    # About 34 bytes a token, layer and unit of width in 16 bits (Korthikanti et al. 2022), attention's matrix apart.
    wide = 34 if config.train.precision != "fp32" and torch.cuda.is_available() else 68
    kept = tokens if not config.model.gradient_checkpointing else tokens / 17
    return {
        "weights": 4 * weights / parts / GIB,
        "gradients and AdamW": 12 * trained / parts / GIB,
        "embeddings": 8 * texts * per_text * towers[0].embedding_dim / GIB,
        "activations": wide * kept * width * layers / GIB,
    }


# ---- findings


def _about_settings(
    config: Config, model: BiEncoderModel, batches: BatchFacts, steps: int, memory: Mapping[str, float]
) -> Iterator[Finding]:
    on_gpu = torch.cuda.is_available() and config.train.device != "cpu"
    gpus = torch.cuda.device_count() if on_gpu else 0
    advice = report.warnings(
        config, batches.first, l2_normalize=model.l2_normalize, multi_vector=model.multi_vector is not None, gpus=gpus
    )
    yield from (Finding(code, text) for code, text in advice.items())
    loss, optim = config.loss, config.optim
    if model.l2_normalize and model.multi_vector is None and loss.temperature >= 0.5:
        yield Finding(
            "temperature",
            f"loss.temperature is {loss.temperature} and cosines are at most 1: no query can prefer its positive by "
            f"more than {2 / loss.temperature:.1f}; set 0.01 to 0.1, or model.l2_normalize to false",
        )
    low, high = (1e-6, 1e-2) if config.lora.r is not None else (1e-7, 1e-3)
    if not low <= optim.lr <= high:
        yield Finding("learning_rate", f"optim.lr is {optim.lr:g}: expected {low:g} to {high:g}, such as 2e-5")
    warm_up = round(optim.warmup_ratio * steps) if optim.warmup_steps is None else optim.warmup_steps
    if warm_up > steps / 2:
        yield Finding("warm_up", f"{warm_up} of {steps} steps are warm-up: lower optim.warmup_steps or warmup_ratio")
    if not model.l2_normalize and model.similarity == "cosine":
        yield Finding(
            "similarity", "trained by products, evaluated by cosine: set eval.similarity to dot, or l2_normalize"
        )
    if on_gpu and (total := sum(memory.values())) > (has := torch.cuda.get_device_properties(0).total_memory / GIB):
        yield Finding(
            "memory", f"about {total:.0f} GiB a rank, and the GPU has {has:.0f}: use lora or train.parallel fsdp2"
        )


def _about_source(facts: SourceFacts, model: BiEncoderModel, config: Config) -> Iterator[Finding]:
    name = facts.name
    for side in facts.tokens:
        cut, limit = facts.truncated(side), facts.limits[side]
        if cut > 0.1:
            half, longest = np.quantile(facts.tokens[side], (0.5, 0.95)).astype(int)
            yield Finding(
                "truncation" if half > 2 * limit else "some_truncation",
                f"{name}: {cut:.0%} of the {side} texts are cut to {limit} tokens; 95 % have up to {longest}: raise "
                f"{side}_max_len",
            )
        if facts.prompted[side] > 0.5:
            yield Finding(
                "prompt_twice",
                f"{name}: {facts.prompted[side]:.0%} of the {side} texts begin with {side}_prefix: leave it out",
            )
    if facts.same_text > 0.01:
        yield Finding(
            "same_text", f"{name}: {facts.same_text:.0%} of the queries are their own positive: leave them out"
        )
    if facts.left_out > 0:
        yield Finding(
            "negative_is_positive",
            f"{name}: {facts.left_out:.1%} of the records have a negative that equals a positive, which is left out: "
            "mine again",
        )
    if facts.repeated > 0.05:
        yield Finding("repeated", f"{name}: {facts.repeated:.0%} of the pairs of query and positive are there before")
    most = max(facts.negatives)
    if config.loss.hardness_mode == "hard_negatives" and most == 0:
        yield Finding(
            "hardness", f"{name}: loss.hardness_mode is hard_negatives and it has none: mine some, or set null"
        )
    if facts.taken is not None and facts.taken - 1 > most:
        yield Finding(
            "too_few_negatives", f"{name}: train_n_passages is {facts.taken}, records have at most {1 + most}"
        )
    usual = next((given for part, given in _PROMPTS.items() if part in config.model.name_or_path.lower()), None)
    if usual is not None and not any(model.prompts.get(side) for side in ("query", "document")):
        yield Finding(
            "prompt_missing",
            f"{config.model.name_or_path} was trained with {usual[0]!r} and {usual[1]!r} before its texts: set "
            "data.query_prefix and data.passage_prefix",
        )


def _about_batches(config: Config, batches: BatchFacts) -> Iterator[Finding]:
    mean = batches.candidates.mean()
    if mean < 16:
        yield Finding("few_candidates", f"a query has {mean:.1f} candidates: raise train.global_batch_size, or mine")
    copied = float((batches.copies > 0).mean())
    if config.loss.mask_duplicates and copied > 0.2:
        yield Finding(
            "masked",
            f"{copied:.0%} of the queries have copies of their positives in the batch, {batches.copies.mean():.1f} on "
            "average, which are masked: set data.no_duplicates, or sample the source",
        )


def _about_candidates(config: Config, examples: Examples) -> Iterator[Finding]:
    try:
        check_candidates(config, examples)
    except ValueError as error:
        yield Finding("no_candidates", str(error))


def _about_grades(examples: Examples, config: Config) -> Iterator[Finding]:
    for source, given in zip(examples.sources, config.data.sources, strict=True):
        if source.columns is None:
            qrels = load_retrieval(given["path"], given.get("split", config.data.split)).qrels
            high = sum(grade > 1 for grades in qrels.values() for grade in grades.values())
            if high:
                yield Finding("grades", f"{source.name}: {high} judgements are above 1, and count as 1 does")


def _leaks(config: Config, examples: Examples, held_out: Examples | None) -> Iterator[Finding]:
    """Compare held-out queries and their documents with those of the training examples, by their texts."""
    if config.eval.data is None and held_out is None:
        return
    step = max(1, len(examples) // LEAKS)
    queries, positives = set(), set()
    for index in range(0, len(examples), step):
        example = examples[index]
        queries.add(query_key(example))
        positives.update(map(passage_key, example.positives))
    sampled = f" (of every {step}th training example)" if step > 1 else ""
    asked: dict[str, list[int]] = {}
    if held_out is not None:
        asked["eval.validation"] = [query_key(example) for example in held_out]
    if config.eval.data is not None:
        data = load_retrieval(config.eval.data, config.eval.split)
        asked["eval.data"] = [query_key(replace(examples[0], query=text)) for text in data.queries]
        rows = {doc: row for row, doc in enumerate(data.doc_ids)}
        relevant = {doc for grades in data.qrels.values() for doc, grade in grades.items() if grade > 0 and doc in rows}
        known = sum(passage_key(Passage(data.documents[rows[doc]])) in positives for doc in sorted(relevant))
        if known > 0.01 * len(relevant):
            yield Finding(
                "leaked_documents",
                f"{known / len(relevant):.0%} of eval.data's relevant documents are positives in training{sampled}: "
                "figures will say less about new documents",
            )
    for name, keys in asked.items():
        if known := sum(key in queries for key in keys):
            yield Finding(
                "leaked_queries" if known > 0.01 * len(keys) else "some_leaked_queries",
                f"{known / len(keys):.1%} of the queries of {name} are training queries{sampled}: take them out",
            )


# ---- in words


def text(checked: Check, name: str) -> Iterator[str]:
    """Yield the lines of the report."""
    counts = Counter(finding.level for finding in checked.findings)
    yield f"{name}: " + (", ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in counts.items()) or "nothing found")
    for finding in checked.findings:
        yield f"{finding.level:8} {finding.code}: {finding.text}"
    for number, facts in enumerate(checked.sources):
        yield f"source {number}, {facts.name}: {facts.examples} examples, {facts.sample} looked at"
        for side, tokens in facts.tokens.items():
            cut = f"{facts.truncated(side):.1%} cut to {facts.limits[side]}"
            yield f"  tokens of a {side:8} {spread(tokens.tolist())}; {cut}"
        yield f"  positives of a query {spread(facts.positives)}; hard negatives {spread(facts.negatives)}"
        of_source = checked.batches.sources == number
        if of_source.any():
            candidates, copies = checked.batches.candidates[of_source], checked.batches.copies[of_source]
            yield f"  candidates of a query {spread(candidates.tolist())}, by the policy {facts.policy}"
            yield f"  expected false negatives {copies.mean():.2f} a query, {(copies > 0).mean():.1%} of the queries"
    yield from checked.lines
