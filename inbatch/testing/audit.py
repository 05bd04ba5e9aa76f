"""The gradient of the contrastive losses that are installed here, by measurement: `inbatch audit`.

Every row is one training step of one library on its own loss, under DDP, against the formula written out below, in
float64. The model has a table of vectors for queries and one for passages, since a shared encoder would hide errors.

Shapes: b rows of a rank, T tokens, D dimension.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inbatch import collectives
from inbatch.grad_cache import GradCache
from inbatch.inbatch_neg_utils import dist_gather_tensor, positive_columns
from inbatch.losses import info_nce
from inbatch.losses.objective import CLIP, GTE
from inbatch.testing import GradientParity, Step, gradient_parity

WORDS, DIM, TEMPERATURE = 25, 16, 0.05
ROWS = 12  # of the global batch
Batch = tuple[Tensor, Tensor, Tensor]  # token ids [b, T] of queries, positives, negatives


@dataclass(frozen=True)
class Row:
    """One setting of one library. kind: of the formula that its loss is in one process. learns: a temperature."""

    library: str
    setting: str
    step: Step
    kind: str = "plain"
    learns: bool = False


class Tables(nn.Module):
    """An encoder for the losses of all libraries: features -> embeddings of rows and of tokens."""

    skiplist: tuple = ()
    do_query_expansion = False

    def __init__(self, *, learns: bool):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.passage = nn.Embedding(WORDS, DIM), nn.Embedding(WORDS, DIM)
        self.log_temperature = nn.Parameter(torch.tensor(TEMPERATURE).log(), requires_grad=learns)
        self.double()

    def __getitem__(self, _: int) -> nn.Module:
        return self  # sentence-transformers asks for the first module

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        ids_bT = features["input_ids"]
        tower, ids_bT = (self.query, ids_bT) if int(ids_bT.max()) < WORDS else (self.passage, ids_bT - WORDS)
        # DDP awaits every parameter in each backward, of which cached losses have several.
        nothing = sum(0.0 * parameter.sum() for parameter in self.parameters())
        tokens_bTD = tower(ids_bT) + nothing
        return {**features, "token_embeddings": tokens_bTD, "sentence_embedding": tokens_bTD.mean(1)} | {
            "temperature": self.log_temperature.exp()
        }


def audit(rows: Iterable[Row]) -> Iterator[tuple[Row, GradientParity | str]]:
    """Yield every row and its result, in words if the step failed."""
    size, rank = collectives.world_size(), collectives.rank()
    if size < 2 or ROWS % size:
        raise ValueError(f"audit: got {size} processes; expected a divisor of {ROWS} above 1: add --nproc-per-node 2")
    generator = torch.Generator().manual_seed(1)
    starts = (0, WORDS, WORDS)
    whole = [torch.randint(start, start + WORDS, (ROWS, 5), generator=generator) for start in starts]
    batches = list(zip(*(column.chunk(size) for column in whole), strict=True))
    for row in rows:
        model, formula = Tables(learns=row.learns), partial(_formula, row.kind)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = gradient_parity(row.step, model, batches, reference=formula, towers=("query", "passage"))
        except Exception as error:  # of any library's code
            found = f"failed on rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        yield row, found


def lines(rows: Iterator[tuple[Row, GradientParity | str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    names = f"library | loss, {collectives.world_size()} processes | cosine, norm | queries | passages | loss"
    for number, (row, found) in enumerate(rows):
        if number == 0:  # not before the first step has run
            yield from (f"| {names} | temperature | it is |", "|---|---|---|---|---|---|---|---|")
        if isinstance(found, str):
            yield f"| {row.library} | {row.setting} | | | | | | {found} |"
            continue
        towers = " | ".join(f"{cos:.3f}, {norm:.3f}" for cos, norm in found.towers.values())
        scalars = ", ".join(f"{ratio:.3f}" for ratio in found.scalars.values())
        yield (
            f"| {row.library} | {row.setting} | {found.cosine:.3f}, {found.norm_ratio:.3f} | {towers} "
            f"| {found.loss_ratio:.3f} | {scalars} | {found.looks_like} |"
        )


# ---- the formulas, in one process


def columns(batch: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return the features of each column of texts."""
    return [{"input_ids": ids_bT, "attention_mask": torch.ones_like(ids_bT)} for ids_bT in batch]


def embedded(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the unit vectors of the queries, those of the other columns, and the temperature."""
    found = [model(features) for features in columns(batch)]
    queries, *others = (F.normalize(one["sentence_embedding"], dim=1) for one in found)
    return queries, others, found[0]["temperature"]


def _formula(kind: str, model: nn.Module, batch: Batch) -> Tensor:
    """Return cross-entropy over all passages; "clip": both directions, no negatives; "maxsim": token by token."""
    if kind == "maxsim":
        tokens = [F.normalize(model(features)["token_embeddings"], dim=-1) for features in columns(batch)]
        scores = torch.einsum("bqd,npd->bnqp", tokens[0], torch.cat(tokens[1:])).amax(-1).sum(-1) / TEMPERATURE
        return backward(F.cross_entropy(scores, torch.arange(len(scores))))
    queries, passages, temperature = embedded(model, batch[:2] if kind == "clip" else batch)
    scores = queries @ torch.cat(passages).T / temperature
    labels = torch.arange(len(scores))
    loss = F.cross_entropy(scores, labels)
    if kind == "clip":
        loss = (loss + F.cross_entropy(scores.T, labels)) / 2
    if kind == "gte":
        own = torch.eye(len(scores), dtype=torch.bool)
        to_queries = (queries @ queries.T / temperature).masked_fill(own, -torch.inf)
        to_passages = passages[0] @ torch.cat(passages).T / temperature
        to_passages = to_passages.masked_fill(F.pad(own, (0, len(own))), -torch.inf)
        back = (passages[0] @ queries.T / temperature).masked_fill(own, -torch.inf)  # the positive counts once
        everything = torch.cat([scores, to_queries, back, to_passages], dim=1)
        loss = (everything.logsumexp(1) - scores.diagonal()).mean()
    return backward(loss)


def backward(loss: Tensor) -> Tensor:
    """Return the loss, after its backward pass."""
    loss.backward()
    return loss


# ---- the steps


def _ours(options: dict[str, Any], texts: int, model: nn.Module, batch: Batch) -> Tensor:
    queries, others, temperature = embedded(model, batch[:texts])
    return backward(info_nce(queries, torch.stack(others, 1).flatten(0, 1), temperature=temperature, **options))


def _grad_cache(model: nn.Module, batch: Batch) -> Tensor:
    def encode(features):
        return F.normalize(model(features)["sentence_embedding"], dim=1)

    def loss(queries, positives, negatives):
        return info_nce(queries, torch.stack([positives, negatives], 1).flatten(0, 1), temperature=TEMPERATURE)

    return GradCache(encode, loss, modules=[model], micro_batch_tokens=10)(*columns(batch))


def _nemo(preserve_grad: bool, model: nn.Module, batch: Batch) -> Tensor:
    queries, others, temperature = embedded(model, batch)
    passages = dist_gather_tensor(torch.stack(others, 1).flatten(0, 1), preserve_grad=preserve_grad)
    assert passages is not None
    return backward(F.cross_entropy(queries @ passages.T / temperature, positive_columns(len(queries), 2)))


def inbatch_rows() -> Iterator[Row]:
    """Yield the rows of this library, and those of the formula that its drop-in gather is made for."""
    for name, options, texts, kind in (
        ("gather", {}, 3, "plain"),
        ("ring", {"negatives": "ring"}, 3, "plain"),
        ("local", {"negatives": "local"}, 3, "plain"),
        ("objective GTE", {"objective": GTE}, 3, "gte"),
        ("objective CLIP", {"objective": CLIP}, 2, "clip"),
    ):
        yield Row("inbatch", f"info_nce, {name}", partial(_ours, options, texts), kind, learns=True)
    yield Row("inbatch", "GradCache + info_nce", _grad_cache)
    for keeps in (False, True):
        setting = f"gather, preserve_grad={keeps}" + ("" if keeps else " (default)")
        yield Row("NeMo AutoModel's formula", setting, partial(_nemo, keeps), learns=True)
