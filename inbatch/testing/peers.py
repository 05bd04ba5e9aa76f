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
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch import collectives
from inbatch.testing.audit import ROWS, TEMPERATURE, Batch, Row, backward, columns, embedded


def peer_rows() -> Iterator[Row]:
    """Yield the rows of the other libraries that are installed: their switches off, as by default, and on."""
    for distribution, name, loss, switches, step, kind in PEERS:
        if (known := _installed(distribution)) is None:
            continue
        for values in product((False, True), repeat=len(switches)):
            options = dict(zip(switches, values, strict=True))
            setting = ", ".join([loss, *(f"{switch}={value}" for switch, value in options.items())])
            default = " (default)" if switches and not any(values) else ""
            yield Row(f"{name} {known}", setting + default, partial(step, **options), kind, learns=kind == "clip")


def missing() -> list[str]:
    """Return the libraries that would be measured if they were installed."""
    return [name for name in dict.fromkeys(peer[0] for peer in PEERS) if _installed(name) is None]


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# ---- the steps


def _columns_loss(module: str, name: str, model: Any, batch: Batch, **options: Any) -> Tensor:
    """Return a loss that takes the model and columns of features, as those of sentence-transformers and PyLate do."""
    loss = getattr(import_module(f"{module}.losses"), name)(model.module, **options)
    loss.model = model  # as their trainer does
    return backward(loss(columns(batch), None))


def _open_clip(model: nn.Module, batch: Batch, **options: bool) -> Tensor:
    images, (texts,), temperature = embedded(model, batch[:2])
    _bare("open_clip", "open_clip")  # which would import torchvision
    make = import_module("open_clip.loss").ClipLoss
    loss = make(rank=collectives.rank(), world_size=collectives.world_size(), **options)
    return backward(loss(images, texts, 1 / temperature))


def _metric_learning(model: nn.Module, batch: Batch, **options: bool) -> Tensor:
    losses, distributed = (import_module(f"pytorch_metric_learning.{name}") for name in ("losses", "utils.distributed"))
    loss = distributed.DistributedLossWrapper(losses.NTXentLoss(temperature=TEMPERATURE), **options)
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


def _tevatron(model: Any, batch: Batch, cached: bool = False) -> Tensor:
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


def _flag_embedding(model: Any, batch: Batch, **options: bool) -> Tensor:
    make = import_module("FlagEmbedding.finetune.embedder.encoder_only.base").BiEncoderOnlyEmbedderModel
    dense = make(_Hidden(model.module), temperature=TEMPERATURE, normalize_embeddings=True, **options)
    wrapped = DistributedDataParallel(dense)
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
    assert spec is not None, f"{package} is installed without its modules"
    sys.modules[name] = module = ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations or ())


def _gradcache() -> Any:
    _bare("grad_cache", "gradcache")  # the name by which the package imports itself
    sys.modules["grad_cache"] = package = import_module("gradcache")
    import_module("gradcache.loss")
    return package


_CACHED = {"mini_batch_size": 3}
# Distribution, its name in the table, the loss, its switches, the step that takes them, and the kind of formula.
PEERS: list[tuple[str, str, str, tuple[str, ...], Callable[..., Tensor], str]] = [
    *(
        ("sentence-transformers", "sentence-transformers", loss, ("gather_across_devices",), step, "plain")
        for loss, options in (("MultipleNegativesRankingLoss", {}), ("CachedMultipleNegativesRankingLoss", _CACHED))
        for step in [partial(_columns_loss, "sentence_transformers", loss, scale=1 / TEMPERATURE, **options)]
    ),
    *(
        ("pylate", "PyLate", loss, ("gather_across_devices",), step, "maxsim")
        for loss, options in (("Contrastive", {}), ("CachedContrastive", _CACHED))
        for step in [partial(_columns_loss, "pylate", loss, temperature=TEMPERATURE, **options)]
    ),
    (
        "pytorch-metric-learning", "pytorch-metric-learning", "NTXentLoss, DistributedLossWrapper", ("efficient",),
        _metric_learning, "plain",
    ),
    ("open_clip_torch", "open_clip", "ClipLoss", ("local_loss", "gather_with_grad"), _open_clip, "clip"),
    ("gradcache", "GradCache", "GradCache, DistributedContrastiveLoss, no_sync_except_last", (), _grad_cache, "plain"),
    ("tevatron", "Tevatron", "DenseModel, negatives_x_device", (), _tevatron, "plain"),
    ("tevatron", "Tevatron", "GCTrainer, negatives_x_device", (), partial(_tevatron, cached=True), "plain"),
    (
        "FlagEmbedding", "FlagEmbedding", "BiEncoderOnlyEmbedderModel", ("negatives_cross_device",), _flag_embedding,
        "plain",
    ),
    ("ms-swift", "ms-swift", "InfonceLoss", (), _swift, "plain"),
]  # fmt: skip
