"""What info_nce accepts. Mistakes are found locally, told in the one agreement exchange, and raised on every rank.

Shapes: B local queries, M local passages, D dimension, K known positives of a query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses.masking import FalseNegatives, passage_keys, row_keys, sharing
from inbatch.losses.objective import Objective
from inbatch.losses.problem import Problem, every
from inbatch.losses.stats import LossStats

NEGATIVES = ("gather", "ring", "local")
# float8 is floating-point to torch too, but nothing here is defined on it: its backward would fail.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of info_nce but for the embeddings."""

    positives: Tensor | None
    temperature: float | Tensor
    false_negatives: FalseNegatives
    negatives: str
    group: ProcessGroup | None
    objective: Objective
    chunk_mib: float | None
    stats: LossStats | None


def find_error(queries: Tensor, passages: Tensor, settings: Settings) -> str | None:
    """The first mistake in this rank's arguments, in words; None if there is none."""
    return (
        _wrong_embeddings(queries, passages)
        or _wrong_positives(settings.positives, queries.shape[0], passages.shape[0], settings.group)
        or _wrong_temperature(settings.temperature)
        or _wrong_ids(settings.false_negatives, queries.shape[0], passages.shape[0])
        or _wrong_options(settings, queries.shape[1])
    )


def _wrong_embeddings(queries: Tensor, passages: Tensor) -> str | None:
    for name, tensor in (("queries", queries), ("passages", passages)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.dtype not in DTYPES:
            return (
                f"{name} must be a floating-point tensor [rows, dimension] of float16, bfloat16, float32 or float64, "
                f"got {_describe(tensor)}"
            )
    if queries.shape[1] != passages.shape[1] or queries.dtype != passages.dtype or queries.device != passages.device:
        return (
            "queries and passages must have the same dimension, dtype and device, got "
            f"{_describe(queries)} on {queries.device} and {_describe(passages)} on {passages.device}"
        )
    return None


def _wrong_positives(positives: Any, num_queries: int, num_passages: int, group: ProcessGroup | None) -> str | None:
    if positives is None:
        if num_queries and (num_passages == 0 or num_passages % num_queries):
            return (
                f"{num_passages} passages cannot be split into equal groups for {num_queries} queries: pass "
                "positives=, the column of each query's positive, or as many passages for each query"
            )
        return None
    if not isinstance(positives, Tensor) or positives.dtype != torch.int64 or positives.shape != (num_queries,):
        return (
            f"positives must be an int64 tensor [{num_queries}], one column for each query, got {_describe(positives)}"
        )
    if num_queries == 0:
        return None
    if positives.is_cuda and collectives.world_size(group) == 1:
        # Reading the values would make the CPU wait for the GPU, and alone there is nobody who would hang.
        inside = ((positives >= 0) & (positives < num_passages)).all()
        torch.ops.aten._assert_async.msg(inside, f"positives must be columns of the {num_passages} local passages")
        return None
    lowest, highest = (int(value) for value in positives.aminmax())
    if lowest < 0 or highest >= num_passages:
        return (
            f"positives must be columns of the {num_passages} local passages, from 0 to {num_passages - 1}, "
            f"got values from {lowest} to {highest}"
        )
    return None


def _wrong_temperature(temperature: Any) -> str | None:
    if isinstance(temperature, Tensor):
        if temperature.ndim or temperature.dtype not in DTYPES:
            return f"temperature must be a float or a 0-d floating-point tensor, got {_describe(temperature)}"
        if temperature.is_meta:
            return "temperature is on the meta device, where it has no value: pass a float or move it to the embeddings"
        if temperature.is_cuda:
            return None  # reading it would make the CPU wait for the GPU
        temperature = temperature.item()
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        return f"temperature must be positive and finite (0.01 to 0.1 for normalised embeddings), got {temperature!r}"
    return None


def _wrong_ids(ids: Any, num_queries: int, num_passages: int) -> str | None:
    if not isinstance(ids, FalseNegatives):
        return f"false_negatives must be FalseNegatives(...), got {_describe(ids)}"
    expected = (
        ("passage_ids", ids.passage_ids, (num_passages,), f"[{num_passages}], one for each local passage"),
        ("query_ids", ids.query_ids, (num_queries,), f"[{num_queries}], one for each local query"),
        ("positive_ids", ids.positive_ids, (num_queries, None), f"[{num_queries}, K], padded with -1"),
    )
    for name, tensor, shape, words in expected:
        if tensor is None:
            continue
        fits = isinstance(tensor, Tensor) and tensor.dtype == torch.int64 and tensor.ndim == len(shape)
        if not fits or any(size is not None and size != got for size, got in zip(shape, tensor.shape, strict=True)):
            return f"FalseNegatives.{name} must be an int64 tensor {words}, got {_describe(tensor)}"
    if ids.positive_ids is not None and ids.passage_ids is None:
        return "FalseNegatives.positive_ids needs passage_ids, the ids of the passages that they are compared with"
    if ids.margin is not None and not (isinstance(ids.margin, Real) and math.isfinite(ids.margin)):
        return (
            f"FalseNegatives.margin must be a finite number in the units of q.p, or None, got {_describe(ids.margin)}"
        )
    return None


def _wrong_options(settings: Settings, dim: int) -> str | None:
    if settings.negatives not in NEGATIVES:
        return f"negatives must be {one_of(NEGATIVES)}, got {settings.negatives!r}"
    if not isinstance(settings.objective, Objective):
        return f"objective must be an Objective(...) or None, got {_describe(settings.objective)}"
    longest = max(settings.objective.matryoshka_dims or (0,))
    if longest > dim:
        return (
            f"matryoshka_dims must not exceed the embeddings' dimension {dim}, got {settings.objective.matryoshka_dims}"
        )
    chunk_mib = settings.chunk_mib
    if chunk_mib is not None and not (isinstance(chunk_mib, (int, float)) and 0 < chunk_mib < math.inf):
        return f"chunk_mib must be a positive number of MiB, or None for the default, got {chunk_mib!r}"
    if settings.stats is not None and not isinstance(settings.stats, LossStats):
        return f"stats must be a LossStats() or None, got {_describe(settings.stats)}"
    return None


def one_of(choices: tuple[str, ...]) -> str:
    """'"a", "b" or "c"'"""
    *first, last = (f'"{choice}"' for choice in choices)
    return f"{', '.join(first)} or {last}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{type(value).__name__} {value!r}"[:80]


def agree(
    queries: Tensor, passages: Tensor, settings: Settings, kernels: ModuleType | None, error: str | None
) -> Problem:
    """The one exchange before the loss. Raises ValueError on every rank if `error` is set on any, or ranks differ."""
    ids, positives, query_width, document_width = settings.false_negatives, None, 1, 0
    fields: dict[str, Tensor | None] = {}
    if error is None:
        ids = _on(queries.device, ids)
        query_width = sharing(settings.positives) if ids.query_ids is not None else 1
        document_width = 0 if ids.positive_ids is None else ids.positive_ids.shape[1]
        fields = {"queries": queries, "passages": passages, "passage_ids": ids.passage_ids, "query_ids": ids.query_ids}
        # Row counts may differ and come back: this is how widths that differ between ranks are agreed on.
        fields["rows sharing a positive"] = torch.empty(query_width, 0, device=queries.device)
        fields["known positives"] = torch.empty(document_width, 0, device=queries.device)
    # What is wrong cannot be relied on to describe itself, and a failure here would leave the other ranks waiting.
    same = _same(settings, kernels) if error is None else None
    counts = collectives.agree("info_nce", fields, group=settings.group, same=same, error=error)
    if sum(counts["queries"]) == 0:
        raise ValueError("info_nce has no queries on any rank: the mean over none is undefined; skip this batch")
    query_width, document_width = max(counts["rows sharing a positive"]), max(counts["known positives"])

    num_queries, num_passages = queries.shape[0], passages.shape[0]
    stride = num_passages // num_queries if settings.positives is None and num_queries else None
    if settings.positives is not None:
        positives = settings.positives.to(queries.device, non_blocking=True)
    else:
        positives = every(stride or 1, 0, num_queries, torch.int64, queries.device)
    return Problem(
        positives=positives,
        stride=stride,
        query_counts=counts["queries"],
        passage_counts=counts["passages"],
        row_keys=row_keys(ids, positives, document_width),
        passage_keys=passage_keys(ids, positives, num_passages, query_width),
        margin=ids.margin,
        objective=settings.objective,
        negatives=settings.negatives,
        kernels=kernels,
        chunk_mib=settings.chunk_mib,
        stats=settings.stats,
        group=settings.group,
    )


def _on(device: torch.device, ids: FalseNegatives) -> FalseNegatives:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return replace(
        ids, passage_ids=move(ids.passage_ids), query_ids=move(ids.query_ids), positive_ids=move(ids.positive_ids)
    )


def _same(settings: Settings, kernels: ModuleType | None) -> dict[str, int | float | str | bool | None]:
    temperature = settings.temperature
    if isinstance(temperature, Tensor):
        # Reading one that is on a GPU would make the CPU wait for it.
        value = "" if temperature.is_cuda else f" of {temperature.item():g}"
        temperature = f"a tensor{value}" + (" requiring grad" if temperature.requires_grad else "")
    return {
        "temperature": temperature,
        "stats": settings.stats is not None,
        "margin": getattr(settings.false_negatives, "margin", None),
        "negatives": settings.negatives,
        "impl": "reference" if kernels is None else kernels.__name__.rpartition(".")[2],
        "objective": repr(settings.objective),
    }
