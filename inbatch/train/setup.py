"""Everything before the first step: the run's folder, the data, the model, the optimizer, and where to go on from."""

import errno
import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from inbatch import collectives
from inbatch.data import BatchPlan, Collator, RetrievalData, load_retrieval, open_examples
from inbatch.data.batches import Batches
from inbatch.data.files import write_json, write_text
from inbatch.encoder.model import BiEncoderModel
from inbatch.losses import CLIP, GTE, QWEN3_EMBEDDING, InfoNCELoss, Objective
from inbatch.retrieval.metrics import check_evaluation
from inbatch.train import checkpoint
from inbatch.train.config import Config, EvalConfig, LossConfig, differences, dump
from inbatch.train.config_file import load
from inbatch.train.optim import build_optimizer
from inbatch.train.run_log import RunLog
from inbatch.train.towers import open_towers, spread

OBJECTIVES = {"info_nce": Objective(), "clip": CLIP, "gte": GTE, "qwen3_embedding": QWEN3_EMBEDDING}


@dataclass(kw_only=True)
class Run:
    """What the loop works with. `networks` are the towers as they are called: in DDP where there are several ranks."""

    config: Config
    device: torch.device
    towers: dict[str, BiEncoderModel]
    networks: dict[str, nn.Module]
    loss: InfoNCELoss
    optimizer: torch.optim.Optimizer
    batches: Batches
    plan: BatchPlan
    evaluation: RetrievalData | None
    first_step: int
    total_steps: int
    log: RunLog

    @property
    def folder(self) -> Path:
        return Path(self.config.train.output_dir)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that is trained, by its name in checkpoints."""
        return {**self.towers, "loss": self.loss}

    @property
    def l2_normalize(self) -> bool:
        return next(iter(self.towers.values())).l2_normalize

    @property
    def query_network(self) -> nn.Module:
        return self.networks.get("query") or self.networks["model"]

    @property
    def passage_network(self) -> nn.Module:
        return self.networks.get("passage") or self.networks["model"]

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16 by autocast; FSDP2 gathers the weights in bfloat16 instead."""
        return self.config.train.parallel != "fsdp2" and computes_in_bf16(self.config, self.device)


def computes_in_bf16(config: Config, device: torch.device) -> bool:
    precision = config.train.precision
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def on_rank_0(function: Callable[[], Any]) -> Any:
    """The value that rank 0 computes, on every rank; an error there is raised on every rank."""
    value = collectives.together(lambda: function() if collectives.rank() == 0 else None)
    return collectives.broadcast_object(value)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder; ValueError, on every rank, while another process is at it.

    The kernel lets go of the lock when rank 0 ends, however it ends; the empty file `.lock` that stays means nothing.
    """
    held: list[IO] = []
    on_rank_0(lambda: held.append(_lock(folder)))
    try:
        yield
    finally:
        for file in held:
            file.close()


def _lock(folder: Path) -> IO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"train.output_dir {folder} is a file or lies below one: choose a folder, new or not"
        ) from None
    file = (folder / ".lock").open("a")
    try:
        # Not flock: that lock would be shared with the forked processes that make batches, which outlive a killed rank
        # for seconds, in which the run could not be started again.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(
                f"{folder} is being written to by another run: wait for its end, or choose another train.output_dir"
            ) from None
        # A file system without locks; a run there is as good as it can be.
    return file


def check_folder(config: Config) -> str | None:
    """The newest checkpoint in the run's folder, if any; ValueError if it holds another run."""
    folder = Path(config.train.output_dir)
    known = folder / "config.yaml"
    if known.exists():
        changed = differences(load(known), config)
        if changed:
            listed = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            raise ValueError(
                f"{folder} holds a run with another configuration ({listed}): choose another train.output_dir"
            )
    found = checkpoint.latest(folder / "checkpoints")
    return str(found[1]) if found else None


def set_up(config: Config, device: torch.device, start: str | None) -> Run | None:
    """Opens data and model and builds what the loop needs; None where the run is done already."""
    together = collectives.together
    examples = together(lambda: open_examples(config.data.train, split=config.data.split, columns=config.data.columns))
    plan = BatchPlan(len(examples), config.train.global_batch_size, config.train.seed)
    total_steps = config.train.max_steps or plan.steps_per_epoch * config.train.epochs
    if on_rank_0(lambda: is_done(config, total_steps, start)):
        return None
    if start:
        on_rank_0(lambda: check_data(config, len(examples)))
    evaluation = together(lambda: open_evaluation(config.eval))
    towers = together(lambda: open_towers(config))
    model = next(iter(towers.values()))
    parameters = sum(p.numel() for p in model.parameters())
    collectives.agree("the model", {}, same={"embedding size": model.embedding_dim, "parameters": parameters})
    networks = spread(towers, config, device, bf16=computes_in_bf16(config, device))
    loss = build_loss(config.loss).to(device)
    try_loss(loss, config.loss, model.embedding_dim, device)
    optimizer = build_optimizer([*towers.values(), loss], config.optim)
    modules = {**towers, "loss": loss}
    first_step = checkpoint.load(start, modules=modules, optimizer=optimizer) if start else 0
    batches = Batches(
        examples,
        plan,
        build_collator(config, model),
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        accumulation_steps=config.train.accumulation_steps,
    )
    on_rank_0(lambda: claim_folder(config, len(examples)))
    return Run(
        config=config,
        device=device,
        towers=towers,
        networks=networks,
        loss=loss,
        optimizer=optimizer,
        batches=batches,
        plan=plan,
        evaluation=evaluation,
        first_step=first_step,
        total_steps=total_steps,
        log=RunLog(
            config.train.output_dir,
            first_step=first_step,
            total_steps=total_steps,
            enabled=collectives.rank() == 0,
            progress=config.train.progress,
        ),
    )


def open_evaluation(config: EvalConfig) -> RetrievalData | None:
    """The data to evaluate with, if any; what is measured is known to be possible before anything is trained."""
    if config.data is None:
        return None
    data = load_retrieval(config.data, config.split)
    check_evaluation(data, config.measures)
    return data


def check_data(config: Config, examples: int) -> None:
    """ValueError if the run to go on with began with more or fewer examples: its batches would be others."""
    known = Path(config.train.output_dir) / "data.json"
    before = json.loads(known.read_text())["examples"] if known.exists() else examples
    if before != examples:
        raise ValueError(
            f"{config.data.train} holds {examples} examples, but the run in {known.parent} began with {before}, and "
            "would repeat some and skip others: bring the data back, or choose another train.output_dir"
        )


def claim_folder(config: Config, examples: int) -> None:
    """Makes the folder this run's: last of all, so that a start that failed for a mistake claims nothing."""
    folder = Path(config.train.output_dir)
    write_json(folder / "data.json", {"examples": examples})
    write_text(folder / "config.yaml", dump(config))


def is_done(config: Config, total_steps: int, start: str | None) -> bool:
    done = Path(config.train.output_dir) / "done.json"
    if not done.exists():
        return False
    steps = json.loads(done.read_text())["steps"]
    if steps < total_steps and start is None:
        raise ValueError(
            f"{done.parent} is done after {steps} steps and kept no checkpoint to go on from to {total_steps}: choose "
            "another train.output_dir (and set checkpoint.every_steps for runs that are to be extended)"
        )
    return steps >= total_steps


def build_loss(config: LossConfig) -> InfoNCELoss:
    return InfoNCELoss(
        config.temperature,
        learnable=config.learnable_temperature,
        negatives=config.negatives,
        impl=config.impl,
        objective=replace(
            OBJECTIVES[config.objective],
            matryoshka_dims=None if config.matryoshka_dims is None else tuple(config.matryoshka_dims),
        ),
    )


def try_loss(loss: InfoNCELoss, config: LossConfig, dimension: int, device: torch.device) -> None:
    """Raises what the loss says of settings that do not go with this model or device; every rank calls it.

    One row shows it. Other settings go with any, and need no kernels compiled for a single row.
    """
    if config.matryoshka_dims is not None or config.impl == "fused":
        row_1D = torch.ones(1, dimension, device=device)
        with torch.no_grad():
            loss(row_1D, row_1D)


def build_collator(config: Config, model: BiEncoderModel) -> Collator:
    return Collator(
        lambda texts, max_length: model.tokenize(texts, max_length=max_length),
        query_max_len=config.data.query_max_len,
        passage_max_len=config.data.passage_max_len,
        query_prefix=model.prompts.get("query", ""),
        passage_prefix=model.prompts.get("document", ""),
        train_n_passages=config.data.train_n_passages,
    )
