"""Training: a plain loop over steps, each of which goes through GradCache. Start it with `inbatch train CONFIG`.

Everything random is a function of (seed, step, rank): the batches, and the dropout too, since the generators are seeded
anew at each step. So a checkpoint is the weights and the optimizer's state, nothing else.
"""

import hashlib
import math
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inbatch import collectives
from inbatch.collectives import on_rank_0
from inbatch.data import RetrievalData, TrainBatch
from inbatch.data.batches import Batches, Part
from inbatch.encoder.packing import wish
from inbatch.encoder.precision import bf16_copies
from inbatch.grad_cache import GradCache
from inbatch.losses import FalseNegatives, LossStats, distill, match_vectors
from inbatch.retrieval.embed import EmbedOptions, evaluating, unwrap
from inbatch.retrieval.evaluate import RetrieveOptions, evaluate
from inbatch.train import checkpoint
from inbatch.train.config import Config, LossConfig, flatten
from inbatch.train.optim import clip_gradients, learning_rate
from inbatch.train.parallel import gathered, is_spread
from inbatch.train.report import OnFigures, Stopwatch, candidates, look_at, mixture, warnings
from inbatch.train.run_folder import RunFolder, read_metrics
from inbatch.train.same import check_shared
from inbatch.train.setup import Learner, Run, set_up
from inbatch.train.stopping import Stopped, held_back
from inbatch.train.towers import save_towers, write_cards

_REMEDY = "lower optim.lr, raise loss.temperature or set train.precision to fp32"


def train(
    config: Config,
    *,
    device: torch.device | None = None,
    data: Any = None,
    on_figures: OnFigures | None = None,
) -> dict[str, float]:
    """Train the run that `config` describes, or go on with it where `train.output_dir` holds a part of it.

    Every rank of the default process group calls it with the same configuration (without a group: one process).
    device: in place of what `train.device` says (auto: the one that `collectives.start` bound, else a GPU if any).
    data: a `datasets.Dataset` or a list of records, in place of the one source that `data.train` then only names.
    on_figures(step, figures): called on rank 0 with each line of metrics.jsonl as it is written. Writes to
    `train.output_dir`: config.yaml, metrics.jsonl, speed.jsonl, tensorboard/, checkpoints/ and, at the end, model/,
    which sentence-transformers opens.

    Returns the last figures of metrics.jsonl by name. A finished run is left unchanged.
    Raises ValueError, on every rank, for data, models or settings that cannot be used, and for a folder that holds
    another run; FloatingPointError where the loss or the weights are no longer finite. At SIGTERM or SIGHUP it saves a
    checkpoint after the step and raises Stopped, a SystemExit.
    """
    device = device or collectives.together(lambda: device_of(config.train.device))
    folder = RunFolder(config.train.output_dir)
    with collectives.group_of_one(device) if config.train.parallel == "fsdp2" else nullcontext():
        collectives.agree("train", {}, same=flatten(config))
        with folder.locked():
            check_shared(folder.path)
            folder.check_config(config)
            clock = Stopwatch()
            run = set_up(config, device, folder, data, on_figures)
            if run is not None:
                try:
                    finish(run, clock, loop(run, clock))
                finally:
                    run.steps.close()
                    if collectives.world_size() == 1:  # after an error, other ranks may be anywhere
                        finish_saving(run, clock)
                    run.report.close()
            elif collectives.rank() == 0:
                print(f"{folder.path}: this run is done; its model is in {folder.model}", file=sys.stderr)
            lines = on_rank_0(lambda: read_metrics(folder.path))
            return {name: value for line in lines for name, value in line.items()}


def device_of(setting: str) -> torch.device:
    """Return the device that `train.device` means; ValueError for a GPU where there is none."""
    if setting == "cpu":
        return torch.device("cpu")
    device = collectives.device()
    if setting == "cuda" != device.type:
        raise ValueError("train.device is cuda but this process has no GPU: set it to auto or cpu")
    return device


# ---- the loop


def loop(run: Run, clock: Stopwatch) -> int:
    """Train to the end of the run, or of its patience; return the number of steps done."""
    config = run.config
    step_function = StepFunction(run.learner, config, run.total_steps)
    clock.turn_to("training")
    with held_back() as signal_so_far:
        for step, parts in enumerate(run.steps, run.first_step):
            if step == run.first_step:
                announce(run, parts)
                evaluate_if_due(run, clock, step)
                if out_of_patience(run):  # as the interrupted run was
                    return step
            # A GPU's rank that waits for another may keep the processor busy; the first step compiles there.
            steps_only = run.learner.device.type == "cuda" and step > run.first_step
            collectives.doing(f"training, step {step + 1}", steps_only=steps_only)
            with collectives.agreeing_on(step=step):
                figures = step_function(step, parts)
            clock.count(pairs=len(run.plan.batch(step)))
            run.report.advance()
            if left_out := run.plan.left_out(step):
                run.report.note(f"{left_out} examples of this pass were left out: they have copies in every batch")
            done = step + 1
            last = done == run.total_steps
            if done == 1 or last or is_due(done, config.train.log_every):
                speed = {"peak_mib": peak_bytes(run.learner.device) / 2**20}
                about = {"epoch": run.plan.epoch(step)}
                if len(run.plan.sizes) > 1 and not run.plan.mixed:
                    about["source"] = int(run.plan.rows(step).sources[0])
                run.report.step(done, {**about, **figures()}, {**clock.read(), **speed})
            # A rank may be signalled alone, and all must stop after the same step.
            sizes = {"signal": signal_so_far(), "writing": run.saving is not None and not run.saving.is_written()}
            come = collectives.agree("the end of a step", same={"step": step}, sizes=sizes)
            stop = max(come["signal"]) if not last else 0
            if run.saving is not None and not any(come["writing"]):
                finish_saving(run, clock)
            if stop or (config.checkpoint.every_steps and (last or is_due(done, config.checkpoint.every_steps))):
                save_checkpoint(run, clock, done)
            if stop:
                finish_saving(run, clock)
                raise Stopped(stop, f" after {done} steps, which are saved: the same command goes on from there")
            if not last:  # the last one waits for the model to be saved
                evaluate_if_due(run, clock, done)
                if out_of_patience(run):
                    return done
    return run.total_steps


def is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


class StepFunction:
    """Take an optimizer step: (step, its parts) -> a function that fetches the step's figures."""

    def __init__(self, learner: Learner, config: Config, total_steps: int):
        self._learner, self._config, self._total_steps = learner, config, total_steps
        self.stats = LossStats()
        self._parts: dict[str, Tensor] = {}  # of the loss, by name, where it has several
        # A network that serves both sides is one callable, so that both share micro-batches.
        encode = {name: partial(self._encode, network) for name, network in learner.networks.items()}
        towers = learner.towers.values() if learner.precision == "bf16" else ()
        self._grad_cache = GradCache(
            list(encode.values()) if len(encode) > 1 else encode["model"],
            self._loss,
            modules=[network for network in learner.networks.values() if is_spread(network)],
            micro_batch_tokens=config.train.micro_batch_tokens,
            keep_graph_mib=config.train.keep_graph_mib,
            packed=all(tower.packed for tower in learner.towers.values()),
            max_over_ranks=collectives.max_over_ranks if config.train.parallel == "fsdp2" else None,
            around=lambda: bf16_copies(*towers),
            reshard=config.train.reshard,
        )

    def __call__(self, step: int, parts: list[Part]) -> Callable[[], dict[str, float]]:
        learner, config = self._learner, self._config
        torch.manual_seed(seed_of(config.train.seed, step, collectives.rank()))
        learner.optimizer.zero_grad(set_to_none=True)
        self.stats, self._parts = (stats := LossStats()), {}
        loss = self.loss(parts)
        norm = clip_gradients(learner.parameters, config.optim.max_grad_norm)
        rate = learning_rate(step, self._total_steps, config.optim)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        others = {"grad_norm": norm, "lr": rate, "temperature": learner.loss.temperature}
        learner.optimizer.step()
        losses = {"loss": loss, **self._parts}
        return lambda: fetch(losses, stats, others)

    def loss(self, parts: list[Part]) -> Tensor:
        """Return the loss of a step's parts; gradients are added to the parameters', unless under no_grad."""
        loss = torch.zeros((), device=self._learner.device)
        for index, part in enumerate(parts):
            sides = self._sides(part.batch)
            last = index + 1 == len(parts)
            loss += self._grad_cache(*sides, loss_kwargs={"part": part}, reduce=last)
        return loss

    def _sides(self, batch: TrainBatch) -> list[dict[str, Any]]:
        sides = []
        for side, tokens in (("query", batch.queries), ("document", batch.passages)):
            tower = unwrap(self._learner.network("query" if side == "query" else "passage"))
            marked = tower.mark(tokens, side)
            if tower.multi_vector is not None and tower.packed:
                # Not in one micro-batch: expanded queries may be encoded with padding, passages need none.
                marked["side"] = side
            sides.append(marked)
        return sides

    def _encode(self, network: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
        # Batches stay in host memory, where GradCache cuts them without stalling the GPU; micro-batches travel.
        collectives.tick()
        tokens = unwrap(network).to_device(tokens)
        autocast = self._learner.precision == "autocast"
        with torch.autocast(self._learner.device.type, torch.bfloat16, enabled=autocast):
            return network(tokens)

    def _loss(self, queries_BD: Tensor, passages_MD: Tensor, part: Part) -> Tensor:
        batch, regular = part.batch, part.batch.regular
        if queries_BD.is_cuda:
            batch = pinned(batch)
        distance = self._distance(queries_BD, passages_MD, batch) if self._config.distill.weight else None
        if self._config.loss.detach_remote:
            regular, own = False, len(passages_MD)
            passages_MD, passage_ids = with_remote(passages_MD, batch.passage_ids)
            batch = replace(batch, passage_ids=passage_ids, positives=batch.positives + len(passages_MD) - own)
        loss = self._learner.loss(
            queries_BD,
            passages_MD,
            positives=None if regular else batch.positives,
            false_negatives=false_negatives(self._config.loss, batch),
            stats=self.stats,
            weights=batch.weights,
            **real_tokens(queries_BD, passages_MD),
        )
        if distance is not None:
            for name, value in (("contrastive_loss", loss), ("distill_loss", distance)):
                self._parts[name] = self._parts.get(name, 0) + value.detach() * part.share_of_step
            loss = self._config.distill.contrastive_weight * loss + self._config.distill.weight * distance
        return loss * part.share_of_step

    def _distance(self, queries_BD: Tensor, passages_MD: Tensor, batch: TrainBatch) -> Tensor:
        """Return the distance from the teacher."""
        config, teacher, scores = self._config.distill, self._learner.teacher, batch.teacher_scores
        if teacher is not None:
            theirs = [
                of_side.of(ids, queries_BD.device)
                for of_side, ids in zip(teacher, (batch.query_ids, batch.passage_ids), strict=True)
            ]
            if config.kind != "pool":
                weights = batch.weights
                if weights is not None:  # a passage has its query's
                    sizes_B = batch.positives.diff(append=torch.tensor([len(passages_MD)]))
                    weights = torch.cat([weights, weights.repeat_interleave(sizes_B)])
                ours = torch.cat([queries_BD, passages_MD])
                return match_vectors(ours, torch.cat(theirs), kind=config.kind, weights=weights)
            scores = theirs[0] @ collectives.all_gather(theirs[1]).T
        assert scores is not None
        return distill(
            queries_BD,
            passages_MD,
            scores,
            over=config.kind,
            positives=batch.positives,
            temperature=config.student_temperature or self._config.loss.temperature,
            teacher_temperature=config.teacher_temperature,
            weights=batch.weights,
            **real_tokens(queries_BD, passages_MD),
        )


def real_tokens(queries: Tensor, passages: Tensor) -> dict[str, Any]:
    """Return the loss's masks of several vectors a text, filled up with zeros; none for one vector a text."""
    return {"query_mask": queries.any(-1), "passage_mask": passages.any(-1)} if queries.ndim == 3 else {}


def seed_of(seed: int, step: int, rank: int) -> int:
    """Return the seed of the generators at a step, which differs for every (seed, step, rank)."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def pinned(batch: TrainBatch) -> TrainBatch:
    """Return the batch with its tensors in pinned memory, from which copies to the GPU make nobody wait."""
    tensors = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def with_remote(passages_MD: Tensor, ids_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the other ranks' passages, without gradient, then these: [N, D], and their ids [N].

    Behind these, they would be hard negatives of the last query's own.
    """
    rows = collectives.agree("passages", {"passages": passages_MD})["passages"]
    before, rank = sum(rows[: collectives.rank()]), collectives.rank()
    others = []
    for mine in (passages_MD, ids_M.to(passages_MD.device)):
        everyones = collectives.all_gather(mine.detach(), rows=rows)
        others.append(torch.cat([everyones[:before], everyones[before + rows[rank] :], mine]))
    return others[0], others[1]


def false_negatives(config: LossConfig, batch: TrainBatch) -> FalseNegatives:
    ids = (batch.passage_ids, batch.query_ids, batch.positive_ids) if config.mask_duplicates else ()
    if config.mask_duplicates == "positive":
        ids = ids[:1]
    return FalseNegatives(
        *ids,
        margin=config.margin,
        candidates="all" if batch.candidates is None else batch.candidates,
        mask_own_negatives=True if batch.mask_own_negatives is None else batch.mask_own_negatives,
    )


def fetch(losses: Mapping[str, Tensor], stats: LossStats, others: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Return the figures of a step as numbers, over all ranks; waits for the device, so only logged steps call it."""
    total = collectives.all_reduce(torch.stack(list(losses.values())))
    means = dict(zip(losses, (total / collectives.world_size()).tolist(), strict=True))
    mean = means["loss"]
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean}: {_REMEDY}")
    counted = stats.result()
    return {
        **means,
        "loss_minus_log_candidates": means.get("contrastive_loss", mean) - math.log(counted["candidates"]),
        **counted,
        **{name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in others.items()},
    }


def peak_bytes(device: torch.device) -> int:
    """Return the most memory this rank has held: of tensors on its GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def announce(run: Run, parts: list[Part]) -> None:
    """Print the candidates of a query, and settings that look wrong, before the first step."""
    first = look_at(parts[0])
    gpus = torch.cuda.device_count() if run.learner.device.type == "cuda" else 0
    model = next(iter(run.learner.towers.values()))
    if model.backend_because or wish(run.config.model.packed, run.learner.device) is None:
        run.report.note(model.way)
    if run.config.train.compile is None and run.learner.device.type == "cuda":
        done = "are compiled, which pays" if run.learner.compiled else "are not compiled, which would not pay"
        run.report.note(f"transformer layers {done} in a run of this length (train.compile decides)")
    several = model.multi_vector is not None
    wrong = warnings(run.config, first, l2_normalize=model.l2_normalize, multi_vector=several, gpus=gpus)
    facts = [*mixture(run.config, run.plan), *candidates(run.config, first, run.plan)]
    for line in (*facts, *(f"warning: {line}" for line in wrong.values())):
        run.report.note(line)


# ---- evaluation and saving


def evaluate_if_due(run: Run, clock: Stopwatch, done: int, *, last: bool = False) -> None:
    """Run the evaluations that are due after `done` steps, but those that an interrupted run has done."""
    config = run.config.eval
    if not last and not (config.at_start if done == 0 else is_due(done, config.every_steps)):
        return
    finish_saving(run, clock)  # so that an evaluation that fails or is killed costs no training
    sets = {"sample": run.sample, "eval": run.evaluation if last or run.sample is None else None}
    evaluated = on_rank_0(lambda: run.report.evaluated(done))
    figures: dict[str, float] = {}
    with clock.during("evaluation"):
        if run.validation is not None and "validation" not in evaluated:
            figures |= held_out_figures(run, *run.validation)
        for name, data in sets.items():
            if data is not None and name not in evaluated:
                figures |= {f"{name}_{measure}": value for measure, value in retrieval_figures(run, data).items()}
    if not figures:
        return
    run.report.evaluation(done, figures)
    if config.keep_best and not last and on_rank_0(lambda: run.report.best_step) == done:
        save_checkpoint(run, clock, done)


def retrieval_figures(run: Run, data: RetrievalData) -> dict[str, float]:
    config, learner = run.config.eval, run.learner
    with gathered(learner.networks.values()):
        return evaluate(
            learner.network("passage"),
            data,
            RetrieveOptions(
                similarity=config.similarity,
                embedding=EmbedOptions(
                    precision=learner.precision,
                    progress="texts" if run.config.train.progress and sys.stderr.isatty() else None,
                ),
            ),
            query_model=learner.network("query"),
            measures=config.measures,
        )


@torch.no_grad()
def held_out_figures(run: Run, batches: Batches, sizes: list[int]) -> dict[str, float]:
    """Return loss, in-batch accuracy and MRR of the held-out batches, without dropout: means over their queries."""
    step_function = StepFunction(run.learner, run.config, run.total_steps)
    with ExitStack() as stack:
        for tower in run.learner.towers.values():
            stack.enter_context(evaluating(tower))
        losses = [step_function.loss(batches.step(step)) * size for step, size in enumerate(sizes)]
    total = collectives.all_reduce(torch.stack(losses).sum()) / collectives.world_size()
    counted = step_function.stats.result()
    return {
        "validation_loss": float(total) / sum(sizes),
        **{f"validation_{name}": counted[name] for name in ("accuracy", "mrr")},
    }


def out_of_patience(run: Run) -> bool:
    """Return True, on every rank, where `eval.patience` evaluations in a row were no better than one before."""
    patience = run.config.eval.patience
    return patience is not None and on_rank_0(lambda: run.report.stale) >= patience


def check_finite(parameters: Iterable[nn.Parameter], done: int) -> None:
    """Raise FloatingPointError, on every rank, if a weight is NaN or infinite: that must replace nothing good."""
    mine = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    finite = torch.stack([p.detach().isfinite().all() for p in mine]).all()
    if collectives.all_reduce(1 - finite.float(), "max").item():
        raise FloatingPointError(
            f"the weights are no longer finite after step {done}, so they are not saved, and what was saved before "
            f"stays: {_REMEDY}"
        )


def save_checkpoint(run: Run, clock: Stopwatch, done: int) -> None:
    """Begin to write a checkpoint, once the previous checkpoint is written, unless that is of the same step."""
    finish_saving(run, clock)
    if run.saved_step == done:
        return
    with clock.during("saving"):
        check_finite(run.learner.parameters, done)
        run.report.sync()
        run.saved_step = done
        run.saving = checkpoint.save(
            run.folder.checkpoints,
            done,
            modules=run.learner.modules,
            optimizer=run.learner.optimizer,
            keep_last=run.config.checkpoint.keep_last,
            keep=run.report.best_step if run.config.eval.keep_best else None,
        )


def finish_saving(run: Run, clock: Stopwatch) -> None:
    if run.saving is not None:
        with clock.during("saving"):
            saving, run.saving = run.saving, None
            saving.finish()


def finish(run: Run, clock: Stopwatch, done: int) -> None:
    """Save the model after `done` steps, evaluate it, save the best one and mark the run as finished."""
    clock.turn_to("saving")
    finish_saving(run, clock)
    check_finite(run.learner.parameters, done)
    save_towers(run.learner.towers, run.config, run.folder.model)
    evaluate_if_due(run, clock, done, last=True)
    config, best = run.config.eval, on_rank_0(lambda: run.report.best_step)
    if config.keep_best and best is not None:
        kept = run.folder.checkpoints / f"step-{best:08d}"
        if best != done and (problem := checkpoint.damage(kept)):  # such as evaluated before eval.keep_best was set
            run.report.note(f"the evaluation after step {best} was the best, and best/ is not written: {problem}")
        else:
            if best != done:
                checkpoint.load(kept, modules=run.learner.modules)
            save_towers(run.learner.towers, run.config, run.folder.best)
    run.report.sync()
    on_rank_0(lambda: write_cards(run.learner.towers, run.config, run.folder.model))
    early = done < run.total_steps
    run.folder.finish(done, [config.patience, config.best_key] if early else None)
    if early:
        run.report.note(
            f"stopped after {done} of {run.total_steps} steps: {config.patience} evaluations were no better by "
            f"{config.best_key} than after step {best}"
        )
    run.report.note(f"done, {done - run.first_step} steps: {clock.summary()}")
