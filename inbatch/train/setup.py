"""Everything before the first step: the data, the model, the optimizer, and where to go on from."""

import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from inbatch import collectives
from inbatch.collectives import on_rank_0
from inbatch.data import Collator, Mixture, RetrievalData, load_retrieval, open_examples
from inbatch.data.batches import Batches, Part
from inbatch.data.identity import keys_of
from inbatch.data.judged import is_judged, sample
from inbatch.data.readers import SETTINGS, Examples
from inbatch.data.token_cache import with_memory
from inbatch.encoder.model import BiEncoderModel
from inbatch.encoder.packing import wish
from inbatch.encoder.precision import chosen
from inbatch.losses import CLIP, GTE, QWEN3_EMBEDDING, InfoNCELoss, Objective
from inbatch.retrieval.embed import is_multi_vector, unwrap
from inbatch.retrieval.evaluate import RetrieveOptions, similarity_of
from inbatch.retrieval.grouping import load_groups
from inbatch.retrieval.metrics import check_evaluation
from inbatch.train import checkpoint
from inbatch.train.boards import check_loggers
from inbatch.train.config import Config, EvalConfig, LossConfig, TrainSource
from inbatch.train.optim import build_optimizer
from inbatch.train.parallel import compile_layers, replicate, shard
from inbatch.train.report import NoReport, OnFigures, Report
from inbatch.train.run_folder import RunFolder
from inbatch.train.same import check_data, check_towers
from inbatch.train.teacher import Vectors, teacher_vectors
from inbatch.train.towers import open_towers

# Compiling took 10 s (MiniLM) and 46 s (Qwen3-0.6B's size) on an H200, and saved a seventh and (on another host)
# three fifths of a step. Without it both did about 1.3e14 operations a second: this many take more than a minute.
REPAYS_COMPILING = 1e16
OBJECTIVES = {"info_nce": Objective(), "clip": CLIP, "gte": GTE, "qwen3_embedding": QWEN3_EMBEDDING}


@dataclass(kw_only=True)
class Learner:
    """Hold all that is trained: the towers, the loss with its temperature, and their optimizer.

    networks: the towers as they are called, in DDP or sharded where ranks share them. precision: one of
    `inbatch.encoder.precision`; fp32 under FSDP2, which gathers bfloat16 weights itself. compiled: torch.compile has
    each transformer layer. teacher: its vectors of queries and of passages.
    """

    device: torch.device
    towers: Mapping[str, BiEncoderModel]
    networks: Mapping[str, nn.Module]
    loss: InfoNCELoss
    optimizer: torch.optim.Optimizer
    precision: str
    compiled: bool
    teacher: tuple[Vectors, Vectors] | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the trained modules, by their names in checkpoints."""
        return {**self.towers, "loss": self.loss}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]

    def network(self, side: str) -> nn.Module:
        """Return the network that embeds a side, "query" or "passage"."""
        return self.networks.get(side) or self.networks["model"]


@dataclass(kw_only=True)
class Run:
    """Hold a run that is ready to begin or to go on.

    evaluation: the whole retrieval set; sample: the part for evaluations before the end. steps: this rank's
    batches. validation: the batches of the held-out records, and their sizes.
    """

    config: Config
    folder: RunFolder
    report: Report
    learner: Learner
    plan: Mixture
    steps: Generator[list[Part]]
    evaluation: RetrievalData | None
    sample: RetrievalData | None
    validation: tuple[Batches, list[int]] | None
    first_step: int
    total_steps: int
    saved_step: int | None  # of the newest checkpoint, which may still be written; 0 where the start was the best
    saving: checkpoint.Saving | None = None  # what is being written


def set_up(
    config: Config, device: torch.device, folder: RunFolder, data: Any = None, on_figures: OnFigures | None = None
) -> Run | None:
    """Open data and model and build what the loop needs; None where the run is finished already."""
    together = collectives.together
    together(lambda: check_loggers(config.train.loggers))
    examples = together(lambda: open_training_data(config, data))
    together(lambda: check_candidates(config, examples))
    together(lambda: check_scores(config, examples))
    plan = together(lambda: plan_mixture(config, examples))
    total_steps = config.train.max_steps or plan.steps_per_epoch * config.train.epochs
    newest = checkpoint.newest_whole(folder.checkpoints)
    on_rank_0(lambda: checkpoint.sweep(folder.checkpoints))
    if is_finished(folder, config.eval, total_steps, can_go_on=newest is not None):
        return None
    if newest is not None:
        check_end(newest[1], newest[0], total_steps)
        folder.check_data(config, len(examples))
    evaluation = together(lambda: open_evaluation(config.eval))
    held_out = together(lambda: open_validation(config))
    check_data(examples, plan, evaluation, held_out)
    towers = together(lambda: open_towers(config, wish(config.model.packed, device)))
    check_towers(towers)
    model = next(iter(towers.values()))

    def batches(examples: Examples, plan: Mixture, sources: Sequence[TrainSource], repeats: bool) -> Batches:
        return Batches(
            examples,
            plan,
            together(lambda: build_collators(config, model, examples, sources, repeats=repeats)),
            rank=collectives.rank(),
            world_size=collectives.world_size(),
            accumulation_steps=config.train.accumulation_steps,
        )

    first_step = 0 if newest is None else newest[0]
    # Workers tokenise while the model moves to its device, a teacher embeds and a checkpoint is read.
    steps = batches(examples, plan, config.data.sources, repeats=total_steps > plan.steps_per_epoch).ahead_from(
        first_step, total_steps, num_workers=config.data.num_workers
    )
    learner = open_learner(config, towers, device, total_steps)
    if config.distill.teacher is not None:
        sets = [examples] if held_out is None else [examples, held_out]
        precision = chosen(config.train.precision, device)
        learner.teacher = teacher_vectors(config.distill.teacher, sets, folder.path / "teacher", device, precision)
        check_vectors(config, learner)
    if evaluation is not None:
        how = RetrieveOptions(similarity=config.eval.similarity)
        together(lambda: similarity_of(learner.network("passage"), how))
    if newest is not None:
        checkpoint.load(newest[1], modules=learner.modules, optimizer=learner.optimizer)
        folder.check_lines(config, first_step)
    validation = None
    if held_out is not None:
        size, seed = config.train.global_batch_size, config.train.seed
        plan_of_it = Mixture(sizes=(len(held_out),), global_batch_size=size, seed=seed)
        sizes = [len(plan_of_it.batch(step)) for step in range(plan_of_it.steps_per_epoch)]
        validation = batches(held_out, plan_of_it, [validation_source(config)], repeats=True), sizes
    part = None
    if evaluation is not None and config.eval.sampled:
        part = sample(evaluation, config.eval.sample_queries, config.eval.sample_documents)
    folder.claim(config, len(examples))
    report = together(
        lambda: Report(folder, config, first_step, total_steps, on_figures) if collectives.rank() == 0 else NoReport()
    )
    return Run(
        config=config,
        folder=folder,
        report=report,
        learner=learner,
        plan=plan,
        steps=steps,
        evaluation=evaluation,
        sample=part,
        validation=validation,
        first_step=first_step,
        total_steps=total_steps,
        saved_step=None if newest is None else first_step,
    )


def open_training_data(config: Config, records: Any = None) -> Examples:
    """Return the examples of `data.train`, or of records in place of the one source that it names."""
    data = config.data
    sources: list[Any] = [_what_is_read(source) for source in data.sources]
    if records is not None:
        if len(sources) > 1:
            raise ValueError(f"data is given beside {len(sources)} sources in data.train: name the records there once")
        sources[0]["path"] = records
    return open_examples(sources, split=data.split, columns=data.columns, corpus=data.corpus, seed=config.train.seed)


def check_candidates(config: Config, examples: Examples) -> None:
    """Raise ValueError for a source whose queries would be compared with nothing: their positive alone."""
    for source, given in zip(examples.sources, config.data.sources, strict=True):
        some = source.examples[:: max(1, len(source.examples) // 1000)]
        alone = given.get("train_n_passages", config.data.train_n_passages) == 1
        if given.get("negatives") == "own" and (alone or not any(example.negatives for example in some)):
            why = "train_n_passages is 1" if alone else f"none of {len(some)} records looked at has a hard negative"
            raise ValueError(
                f"{source.name}: negatives is own, and {why}, so that a query has no candidates but its positive: mine "
                "negatives (inbatch mine), or set negatives to all"
            )


def needs_scores(config: Config) -> bool:
    """Return True where a run learns from scores in its records."""
    return config.distill.weight > 0 and config.distill.kind == "group"


def check_scores(config: Config, examples: Examples) -> None:
    """Raise ValueError where a teacher's scores are wanted and no source has any; warn of sources without."""
    lacking, usable = [], 0
    for source in examples.sources if needs_scores(config) else ():
        some = source.examples[:: max(1, len(source.examples) // 1000)]
        without = sum(len(example.scores) <= 1 for example in some)
        usable += len(some) - without
        if without:
            lacking.append(f"{source.name} ({without} of {len(some)} records looked at)")
    if lacking and not usable:
        raise ValueError(
            f"distill.weight is {config.distill.weight}, and no record has a teacher's scores: {', '.join(lacking)}. "
            "inbatch mine --teacher MODEL writes them as pos_scores and neg_scores; data.columns names other columns"
        )
    if lacking:
        warnings.warn(f"no scores of a teacher to distill in {', '.join(lacking)}", stacklevel=2)


def _what_is_read(source: TrainSource) -> dict[str, object]:
    return {key: value for key, value in source.items() if key in SETTINGS}


def validation_source(config: Config) -> TrainSource:
    """Return the held-out records' source, with the settings of `data` that they need as the training records do."""
    given = config.eval.validation
    assert given is not None
    source: TrainSource = {"path": given} if isinstance(given, str) else given
    usual: dict[str, Any] = {"split": config.eval.split}
    if not is_judged(Path(source["path"])):  # whose columns are fixed
        usual |= {"columns": config.data.columns, "corpus": config.data.corpus}
    return cast(TrainSource, {**usual, **source})


def open_validation(config: Config) -> Examples | None:
    """Return the held-out records, if any."""
    if config.eval.validation is None:
        return None
    return open_examples([_what_is_read(validation_source(config))], seed=config.train.seed)


def plan_mixture(config: Config, examples: Examples) -> Mixture:
    """Return the plan of batches from all sources; ValueError for incomplete weights."""
    data = config.data
    sizes = tuple(len(source.examples) for source in examples.sources)
    given = [source["weight"] for source in data.sources if "weight" in source]
    if given and len(given) < len(sizes):
        raise ValueError(f"data.train gives {len(given)} of its {len(sizes)} sources a weight: give all or none one")
    weights = tuple(given) or None
    if not given and data.source_weights != "proportional":
        power = 0.0 if isinstance(data.source_weights, str) else 1 / data.source_weights
        weights = tuple(size**power for size in sizes)
    return Mixture(
        sizes=sizes,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        weights=weights,
        mixed=data.mixed_batches and len(sizes) > 1,
        shuffle=data.shuffle,
        drop_last=data.drop_last,
        keys=tuple(keys_of(source.examples, examples.same, source.also, data.columns) for source in examples.sources)
        if data.no_duplicates
        else None,
        groups=tuple(
            load_groups(given["groups"], source.examples) if "groups" in given else None
            for given, source in zip(data.sources, examples.sources, strict=True)
        ),
    )


def is_finished(folder: RunFolder, config: EvalConfig, total_steps: int, *, can_go_on: bool) -> bool:
    """Return True if the run has done `total_steps`, or lost its patience; ValueError where it cannot go on to them."""
    done = folder.done()
    steps = done.get("steps")
    if steps is None:
        return False
    if done.get("ended_by") == [config.patience, config.best_key]:
        return True
    if steps < total_steps and not can_go_on:
        raise ValueError(
            f"{folder.path} is done after {steps} steps and kept no checkpoint to go on from to {total_steps}: choose "
            "another train.output_dir (and set checkpoint.every_steps for runs that are to be extended)"
        )
    return steps >= total_steps


def check_end(newest: Path, step: int, total_steps: int) -> None:
    """Raise ValueError if the newest checkpoint, of this step, is beyond the end of the run."""
    if step > total_steps:
        raise ValueError(
            f"{newest.parents[1]} has a checkpoint of step {step}, and the run is to have {total_steps}: set "
            "train.max_steps (or train.epochs) higher, or delete the checkpoints after that step"
        )


def open_evaluation(config: EvalConfig) -> RetrievalData | None:
    """Return the data to evaluate with, if any, once it is certain that all measures can be computed."""
    if config.data is None:
        return None
    data = load_retrieval(config.data, config.split)
    check_evaluation(data, config.measures)
    return data


def open_learner(
    config: Config, towers: Mapping[str, BiEncoderModel], device: torch.device, total_steps: int
) -> Learner:
    """Spread the towers over the ranks, and build loss and optimizer."""
    model = next(iter(towers.values()))
    sharded = config.train.parallel == "fsdp2"
    precision = chosen(config.train.precision, device)
    compiled = config.train.compile
    if compiled is None:
        compiled = device.type == "cuda" and operations(towers, config, total_steps) > REPAYS_COMPILING
        compiled = compiled and all(any(isinstance(m, nn.ModuleList) for m in t.modules()) for t in towers.values())
    for tower in towers.values() if compiled else ():
        compile_layers(tower)
    networks = {
        name: shard(tower, device, bf16=precision != "fp32") if sharded else replicate(tower, device)
        for name, tower in towers.items()
    }
    loss = build_loss(config.loss, model.embedding_dim, device)
    return Learner(
        device=device,
        towers=towers,
        networks=networks,
        loss=loss,
        optimizer=build_optimizer([*towers.values(), loss], config.optim),
        precision="fp32" if sharded else precision,
        compiled=compiled,
    )


def operations(towers: Mapping[str, BiEncoderModel], config: Config, total_steps: int) -> float:
    """Return the floating-point operations of a rank in the whole run, at most: 6 a token and weight of a product.

    It follows from the settings alone, so that all ranks, and a resumed run, get the same number.
    """
    products = [m for tower in towers.values() for m in tower.backbone.modules() if isinstance(m, nn.Linear)]
    weights = sum(module.weight.numel() for module in products) / len(towers)
    tokens = config.data.query_max_len + (config.data.train_n_passages or 2) * config.data.passage_max_len
    rows = config.train.global_batch_size * total_steps / collectives.world_size()
    return 6.0 * weights * tokens * rows


def check_vectors(config: Config, learner: Learner) -> None:
    """Raise ValueError if the student's vectors cannot have the shape of the teacher's."""
    assert learner.teacher is not None
    if config.distill.kind == "pool":  # which compares products
        return
    ours, theirs = learner.network("query"), learner.teacher[0].vectors.shape[1]
    if is_multi_vector(ours):
        raise ValueError(
            f"distill.kind is {config.distill.kind}, and the model gives a text several vectors: set it to pool"
        )
    if (dimension := unwrap(ours).embedding_dim) != theirs:
        raise ValueError(
            f"distill.kind is {config.distill.kind}, and the teacher's vectors have {theirs} dimensions, the model's "
            f"{dimension}: set it to pool, which compares products alone, or take a teacher of {dimension}"
        )


def build_loss(config: LossConfig, dimension: int, device: torch.device) -> InfoNCELoss:
    """Return the loss, tried where a setting may not suit the model or the device. Every rank calls it."""
    loss = InfoNCELoss(
        config.temperature,
        learnable=config.learnable_temperature,
        # To the loss, passages of other ranks without gradient are this rank's.
        negatives="local" if config.detach_remote else config.negatives,
        impl=config.impl,
        objective=replace(
            OBJECTIVES[config.objective],
            matryoshka_dims=None if config.matryoshka_dims is None else tuple(config.matryoshka_dims),
            hardness_mode=config.hardness_mode,
            hardness_strength=config.hardness_strength,
        ),
    ).to(device)
    # Other settings go with any model, and need no kernels compiled for a single row.
    if config.matryoshka_dims is not None or config.impl == "fused":
        row_1D = torch.ones(1, dimension, device=device)
        with torch.no_grad():
            loss(row_1D, row_1D)
    return loss


def build_collators(
    config: Config, model: BiEncoderModel, examples: Examples, sources: Sequence[TrainSource], *, repeats: bool
) -> list[Collator]:
    """Return the collator of each source; repeats: True if the run reads some example twice."""

    def tokenize(texts: list[str], max_length: int) -> Mapping[str, torch.Tensor]:
        return model.tokenize(texts, max_length=max_length)

    usual = Collator(
        with_memory(tokenize, model.tokenizer, examples, config.data.token_cache, repeats=repeats),
        query_max_len=config.data.query_max_len,
        passage_max_len=config.data.passage_max_len,
        query_prefix=model.prompts.get("query", ""),
        passage_prefix=model.prompts.get("document", ""),
        train_n_passages=config.data.train_n_passages,
        rotate_passages=config.data.rotate_passages,
        instructions=config.data.instructions,
        teacher_scores=needs_scores(config),
        same=examples.same,
    )
    own = {field.name for field in fields(Collator)} - {"tokenize", "same"}
    return [replace(usual, **{key: source[key] for key in own if key in source}) for source in sources]
