"""Training steps of other libraries, by their code, for `inbatch audit`.

Shapes: b rows of a rank, D dimension.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch import collectives
from inbatch.testing.audit import ROWS, TEMPERATURE, Batch, Row, Step, backward, columns, embedded


def peer_rows() -> Iterator[Row]:
    """Yield the rows of the other libraries that are installed."""
    for distribution, (name, kind, settings) in PEERS.items():
        if (known := installed(distribution)) is not None:
            for setting, step in settings.items():
                yield Row(f"{name} {known}", setting, step, kind, learns=kind == "clip")


def missing() -> list[str]:
    """Return the libraries that would be measured if they were installed."""
    return [name for name in PEERS if installed(name) is None]


def installed(distribution: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# ---- the steps


def _columns_loss(module: str, name: str, options: dict[str, Any], model: Any, batch: Batch) -> Tensor:
    """Return a loss that takes the model and columns of features, as those of sentence-transformers and PyLate do."""
    loss = getattr(import_module(module), name)(model.module, **options)
    loss.model = model  # as their trainer does
    return backward(loss(columns(batch), None))


def _open_clip(options: dict[str, Any], model: nn.Module, batch: Batch) -> Tensor:
    images, (texts,), temperature = embedded(model, batch[:2])
    _bare("open_clip", "open_clip")  # which would import torchvision
    make = import_module("open_clip.loss").ClipLoss
    loss = make(rank=collectives.rank(), world_size=collectives.world_size(), **options)
    return backward(loss(images, texts, 1 / temperature))


def _metric_learning(efficient: bool, model: nn.Module, batch: Batch) -> Tensor:
    losses, distributed = (import_module(f"pytorch_metric_learning.{name}") for name in ("losses", "utils.distributed"))
    loss = distributed.DistributedLossWrapper(losses.NTXentLoss(temperature=TEMPERATURE), efficient=efficient)
    queries, passages, _ = embedded(model, batch)
    labels = torch.arange(len(queries)) + collectives.rank() * len(queries)
    return backward(loss(queries, labels, ref_emb=torch.cat(passages), ref_labels=torch.cat([labels, labels + ROWS])))


def _grad_cache(model: nn.Module, batch: Batch) -> Tensor:
    gradcache = _gradcache()
    cache = gradcache.GradCache(
        models=[model, model],
        chunk_sizes=3,
        loss_fn=gradcache.loss.DistributedContrastiveLoss(n_hard_negatives=1),
        split_input_fn=lambda ids_bT, size: [columns([part]) for part in ids_bT.split(size)],
        get_rep_fn=lambda output: _scaled(output["sentence_embedding"]),
    )
    return cache(batch[0], torch.stack(batch[1:], 1).flatten(0, 1), no_sync_except_last=True)


class _Hidden(nn.Module):
    """A transformer for the libraries that pool by themselves: the vector of a text, as the state of its only token."""

    def __init__(self, tables: nn.Module):
        super().__init__()
        self.tables = tables

    def forward(self, return_dict: bool = True, **features: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=_scaled(self.tables(features)["sentence_embedding"])[:, None])


def _texts(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the features of the queries, and of the passages with every positive before its negative."""
    queries, passages = columns([batch[0], torch.stack(batch[1:], 1).flatten(0, 1)])
    return queries, passages


def _tevatron(cached: bool, model: Any, batch: Batch) -> Tensor:
    lm = _Hidden(model.module)
    arguments = SimpleNamespace(negatives_x_device=True, per_device_train_batch_size=len(batch[0]), local_rank=0)
    dense = import_module("tevatron.modeling").DenseModel(
        lm, lm, train_args=arguments, data_args=SimpleNamespace(train_n_passages=2)
    )
    wrapped = DistributedDataParallel(dense)
    if not cached:
        # DenseTrainer.training_step returns the loss of the model so, after its backward pass.
        return backward(wrapped(*_texts(batch)).loss) / collectives.world_size()
    gradcache, trainer = _gradcache(), import_module("tevatron.trainer")
    cache = gradcache.GradCache(
        [wrapped, wrapped],
        3,
        trainer.DistributedContrastiveLoss(2),
        split_input_fn=trainer.split_dense_inputs,
        get_rep_fn=trainer.get_dense_rep,
    )
    holder = SimpleNamespace(
        gc=cache,
        args=arguments,
        _dist_loss_scale_factor=collectives.world_size(),
        _prepare_inputs=lambda inputs: inputs,
    )
    return trainer.GCTrainer.training_step(holder, wrapped, _texts(batch))


def _flag_embedding(across: bool, model: Any, batch: Batch) -> Tensor:
    make = import_module("FlagEmbedding.finetune.embedder.encoder_only.base").BiEncoderOnlyEmbedderModel
    settings = {"negatives_cross_device": across, "temperature": TEMPERATURE, "normalize_embeddings": True}
    wrapped = DistributedDataParallel(make(_Hidden(model.module), **settings))
    return backward(wrapped(*_texts(batch)).loss)


def _swift(model: nn.Module, batch: Batch) -> Tensor:
    os.environ["INFONCE_TEMPERATURE"] = str(TEMPERATURE)
    state = import_module("accelerate.state").PartialState
    state._reset_state()  # other libraries' imports may have made it for one process
    state(cpu=True)  # as their training arguments do
    queries, others, _ = embedded(model, batch)
    sentences = torch.stack([queries, *others], 1).flatten(0, 1)
    loss = import_module("swift.loss.embedding").InfonceLoss(None, None)
    return backward(loss({"last_hidden_state": sentences}, torch.tensor([1, 0]).repeat(len(queries))))


def _scaled(vectors_bD: Tensor) -> Tensor:
    """Return vectors whose dot products are cosines over the temperature, for losses that have none."""
    return F.normalize(vectors_bD, dim=1) * TEMPERATURE**-0.5


def _bare(name: str, package: str) -> None:
    """Let the modules of an installed package be imported as `name.module`, without what its `__init__` imports."""
    if name in sys.modules:
        return
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    sys.modules[name] = module = ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations or ())


def _gradcache() -> Any:
    _bare("grad_cache", "gradcache")  # the name by which the package imports itself
    sys.modules["grad_cache"] = package = import_module("gradcache")
    import_module("gradcache.loss")
    return package


# ---- the settings


def _by_option(name: str, option: str, step: Callable[[bool], Step]) -> dict[str, Step]:
    return {f"{name}, {option}=False (default)": step(False), f"{name}, {option}=True": step(True)}


def _losses_of_columns(module: str, name: str, cached: str, options: dict[str, Any]) -> dict[str, Step]:
    def step(loss: str, more: dict[str, Any], gathers: bool) -> Step:
        return partial(_columns_loss, module, loss, {**options, **more, "gather_across_devices": gathers})

    return _by_option(name, "gather_across_devices", partial(step, name, {})) | _by_option(
        cached, "gather_across_devices", partial(step, cached, {"mini_batch_size": 3})
    )


# By distribution: the name to print, the kind of formula, and the step of every setting.
PEERS: dict[str, tuple[str, str, dict[str, Step]]] = {
    "sentence-transformers": (
        "sentence-transformers",
        "plain",
        _losses_of_columns(
            "sentence_transformers.losses",
            "MultipleNegativesRankingLoss",
            "CachedMultipleNegativesRankingLoss",
            {"scale": 1 / TEMPERATURE},
        ),
    ),
    "pylate": (
        "PyLate",
        "maxsim",
        _losses_of_columns("pylate.losses", "Contrastive", "CachedContrastive", {"temperature": TEMPERATURE}),
    ),
    "pytorch-metric-learning": (
        "pytorch-metric-learning",
        "plain",
        _by_option(
            "NTXentLoss, DistributedLossWrapper", "efficient", lambda efficient: partial(_metric_learning, efficient)
        ),
    ),
    "open_clip_torch": (
        "open_clip",
        "clip",
        {
            f"ClipLoss, local_loss={local}, gather_with_grad={grad}{'' if local or grad else ' (default)'}": partial(
                _open_clip, {"local_loss": local, "gather_with_grad": grad}
            )
            for local in (False, True)
            for grad in (False, True)
        },
    ),
    "gradcache": ("GradCache", "plain", {"GradCache, DistributedContrastiveLoss, no_sync_except_last": _grad_cache}),
    "tevatron": (
        "Tevatron",
        "plain",
        {
            "DenseModel, negatives_x_device": partial(_tevatron, False),
            "GCTrainer, negatives_x_device": partial(_tevatron, True),
        },
    ),
    "FlagEmbedding": (
        "FlagEmbedding",
        "plain",
        _by_option(
            "BiEncoderOnlyEmbedderModel", "negatives_cross_device", lambda across: partial(_flag_embedding, across)
        ),
    ),
    "ms-swift": ("ms-swift", "plain", {"InfonceLoss": _swift}),
}
