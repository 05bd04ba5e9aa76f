"""The loss: check what is given, agree with the other ranks, and add up the softmaxes that the objective asks for.

Shapes: B local queries, M local passages, D dimension, K known positives of a query.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses import tiled
from inbatch.losses.composed import composed, multi_vector
from inbatch.losses.gathered import Softmax
from inbatch.losses.kernels import Kernels
from inbatch.losses.masking import (
    CANDIDATES,
    NO_IDS,
    FalseNegatives,
    group_keys,
    group_rules,
    passage_keys,
    positives_by_query,
    row_keys,
    sharing,
)
from inbatch.losses.max_sim import Sides, read_spans
from inbatch.losses.objective import PLAIN, Objective, terms
from inbatch.losses.softmax import LEAST_TEMPERATURE, TOKEN_REDUCTIONS, Problem
from inbatch.losses.stats import LossStats
from inbatch.other_names import explains_other_names

IMPLEMENTATIONS = ("auto", "reference", "tiled", "fused")
NEGATIVES = ("gather", "ring", "local")
# float8 is floating-point to torch too, but nothing here is defined on it: its backward would fail.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@explains_other_names
@collectives.uncompiled
def info_nce(
    queries: Tensor,
    passages: Tensor,
    *,
    positives: Tensor | None = None,
    temperature: float | Tensor = 0.02,
    false_negatives: FalseNegatives | None = None,
    negatives: str = "gather",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    objective: Objective | None = None,
    chunk_mib: float | None = None,
    stats: LossStats | None = None,
    weights: Tensor | None = None,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    token_reduction: str = "sum",
) -> Tensor:
    """Compute the mean over the queries of all ranks of  logsumexp_{j in C(i)} s_ij - s_i,y(i).

    s_ij = q_i . p_j / temperature; C(i): the passages of all ranks less what `false_negatives` leaves out. `Objective`:
    other sums of such terms.

    queries [B, D], passages [M, D]: both float16, bfloat16, float32 or float64; B, M may differ by rank and may be 0
    positives [B] int64: column of each query's positive among the local passages; default: equal groups, positive first
        (on a GPU it is checked there; on the CPU it costs no synchronisation)
    temperature: positive float, or a 0-d tensor that may require grad
    negatives: "gather", "ring" (never gathers: memory independent of the number of ranks) or "local" (this rank's only)
    impl: "auto", "reference" (dense), "tiled" (plain PyTorch, bounded memory) or "fused" (Triton)
    chunk_mib: bound on the exponentials held at once; None: 32 for "tiled", 1024 to 2048 for "fused"
    stats: counts candidates, masked columns and hits
    weights [B], not negative: of the rows' losses; the sum of weight times loss is divided by the number of queries

    Late interaction: queries [B, Tq, D], passages [M, Tp, D] (Tq, Tp may differ by rank). q . p is then the sum over
    the tokens of q (their mean with token_reduction="mean") of the maximum over the tokens of p of their products.
    query_mask, passage_mask [B, Tq], [M, Tp]: not 0 where a token is real, as attention masks; None: all are. A masked
    token neither wins nor counts, and does not travel. Of equal maxima the first token gets the gradient. Directions:
    query_to_passage and passage_to_query. "fused": up to 256 dimensions.

    Returns a 0-d tensor, float32 (float64 for float64 inputs): W * (this rank's sum) / (queries of all ranks). Averaged
    over the W ranks it is the loss, and gradients averaged over ranks (DDP, FSDP2) are those of one process. They are
    made with the loss, so it is differentiable once (twice with impl="reference").
    Raises ValueError, on every rank, for wrong or disagreeing inputs. (van den Oord et al. 2018; Karpukhin et al. 2020)
    """
    if not torch.is_grad_enabled():  # else the gradient would be made for nothing
        queries, passages, temperature = map(_detached, (queries, passages, temperature))
    if isinstance(temperature, Real):
        temperature = float(temperature)  # NumPy's, too
    extras = positives, objective, chunk_mib, stats, weights, query_mask, passage_mask
    if impl == "auto" and isinstance(queries, Tensor) and queries.is_cuda and all(x is None for x in extras):
        from inbatch.losses.triton import small  # here, since it imports triton

        right = negatives in NEGATIVES and token_reduction in TOKEN_REDUCTIONS
        if right and collectives.world_size(group) == 1 and small.fits(queries, passages, temperature, false_negatives):
            ids = None if false_negatives is None else false_negatives.passage_ids
            return small.SmallSoftmax.apply(queries, passages, ids, temperature)
    asked = Problem(
        objective=PLAIN if objective is None else objective,
        temperature=temperature,
        false_negatives=NO_IDS if false_negatives is None else false_negatives,
        negatives=negatives,
        chunk_mib=chunk_mib,
        stats=stats,
        group=group,
        positives=slice(None) if positives is None else positives,
        weights=weights,
        token_reduction=token_reduction,
    )
    sides = {"query_mask": (queries, query_mask), "passage_mask": (passages, passage_mask)}
    error = find_error(asked, sides)
    kernels, error = (None, error) if error is not None else _choose(impl, queries)
    late = error is None and queries.ndim == 3
    spans, error = read_spans(sides, fused=kernels not in (None, tiled)) if late else ([], error)
    problem = _agree(queries, passages, asked, kernels, error)
    if kernels is not None and not late:
        softmaxes = terms(problem.objective, queries.shape[1])
        if len(softmaxes) == 1 and softmaxes[0].plain:
            return Softmax.apply(queries, passages, None, problem.temperature, problem, softmaxes[0])
    with torch.autocast(queries.device.type, enabled=False):
        return multi_vector(queries, passages, spans, problem) if late else composed(queries, passages, problem)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# ---- agreement


def _choose(impl: str, queries: Tensor) -> tuple[Kernels | None, str | None]:
    """Return the module with the kernels (None: the reference), or what is wrong."""
    if impl == "reference":
        return None, None
    if impl not in IMPLEMENTATIONS:
        return None, f"impl must be {one_of(IMPLEMENTATIONS)}, got {impl!r}"
    if impl == "tiled" or (impl == "auto" and not queries.is_cuda):
        return tiled, None
    from inbatch.losses.triton import host as fused  # here, since it imports triton

    reason = fused.why_not(queries)
    if reason is None:
        return fused, None
    return (tiled, None) if impl == "auto" else (None, f'impl="fused" cannot run here: {reason}; use impl="auto"')


def _agree(queries: Tensor, passages: Tensor, asked: Problem, kernels: Kernels | None, error: str | None) -> Problem:
    """Make the one exchange before the loss. Raises ValueError on every rank if any has an error, or ranks differ."""
    fields, sizes, same, ids = {}, {}, None, asked.false_negatives
    if error is None:  # what is wrong cannot be relied on to describe itself: a failure here would leave others waiting
        fields = {"queries": queries, "passages": passages, "passage_ids": ids.passage_ids, "query_ids": ids.query_ids}
        shared = sharing(asked.positives) if isinstance(asked.positives, Tensor) and ids.query_ids is not None else 1
        sizes["rows sharing a positive"] = shared
        sizes["known positives"] = 0 if ids.positive_ids is None else ids.positive_ids.shape[1]
        same = _same(asked, kernels)
    ragged = ("queries", "passages") if error is None and queries.ndim == 3 else ()
    counts = collectives.agree(
        "info_nce", fields, group=asked.group, sizes=sizes, same=same, ragged=ragged, error=error
    )
    if sum(counts["queries"]) == 0:
        raise ValueError("info_nce has no queries on any rank: the mean over none is undefined; skip this batch")

    num_queries, num_passages, positives = queries.shape[0], passages.shape[0], asked.positives
    if isinstance(positives, Tensor):
        positives = positives.to(queries.device, non_blocking=True)
    else:
        group_size = num_passages // num_queries if num_queries else 1
        positives = slice(0, num_queries * group_size, group_size)
    weights = asked.weights
    if weights is not None:
        weights = weights.to(queries.device, torch.promote_types(queries.dtype, torch.float32), non_blocking=True)
    problem = replace(
        asked,
        kernels=kernels,
        positives=positives,
        dtype=queries.dtype,
        rank=collectives.rank(asked.group),
        query_counts=counts["queries"],
        passage_counts=counts["passages"],
        weights=weights,
    )
    grouped = ids.needs_groups or asked.objective.hardness_mode is not None
    if ids.passage_ids is None and ids.query_ids is None and not grouped:
        return problem
    given = {name: getattr(ids, name) for name in ("passage_ids", "query_ids", "positive_ids")}
    on_device = FalseNegatives(
        **{name: t.to(queries.device, non_blocking=True) for name, t in given.items() if t is not None}
    )
    known = []
    if (padded := on_device.positive_ids) is not None:
        missing = max(counts["known positives"]) - padded.shape[1]
        known.append(F.pad(padded, (0, missing), value=-1) if missing else padded)
    if ids.passage_ids is not None and ids.query_ids is not None:
        same_query = _positives_of_same_query(asked, problem, queries.device)
        known += [] if same_query is None else [same_query.to(queries.device, non_blocking=True)]
    rows = row_keys(on_device, positives, known)
    columns = passage_keys(on_device, positives, num_passages, max(counts["rows sharing a positive"]))
    if grouped:
        places_B, before = positives, sum(counts["passages"][: problem.rank])
        if isinstance(places_B, slice):
            places_B = torch.arange(places_B.start, places_B.stop, places_B.step, device=queries.device)
        of_rows, of_columns = group_keys(places_B, num_passages, before)
        rows, columns = rows._replace(groups=of_rows), columns._replace(groups=of_columns)
        problem = replace(problem, rules=group_rules(ids, num_queries, queries.device))
    return replace(problem, row_keys=rows, passage_keys=columns, query_keys=rows)


def _positives_of_same_query(asked: Problem, problem: Problem, device: torch.device) -> Tensor | None:
    """Return the positives [B, K] of all rows with a row's query id, on any rank; None if every query id is unique."""
    ids, group = asked.false_negatives, asked.group
    assert ids.passage_ids is not None
    assert ids.query_ids is not None
    everyone = problem.negatives != "local" and len(problem.query_counts) > 1
    # On the CPU if that is where the ids are: reading a width back from a GPU would make the CPU wait for it.
    given = [ids.passage_ids, ids.query_ids, *([asked.positives] if isinstance(asked.positives, Tensor) else [])]
    on_cpu = all(x.device.type == "cpu" for x in given) and (not everyone or "cpu" in collectives.device_types(group))
    place, positives = torch.device("cpu") if on_cpu else device, problem.positives
    if on_cpu and isinstance(asked.positives, Tensor):
        positives = asked.positives
    query_ids = ids.query_ids.to(place)
    pairs = torch.stack([query_ids, ids.passage_ids.to(place)[positives]], dim=1)
    return positives_by_query(
        query_ids, collectives.gather_rows(pairs, problem.query_counts, group) if everyone else pairs
    )


def _same(asked: Problem, kernels: Kernels | None) -> dict[str, int | float | str | bool | None]:
    """Return what must be equal on all ranks besides the tensors."""
    temperature = asked.temperature
    candidates, masked = asked.false_negatives.candidates, asked.false_negatives.mask_own_negatives
    if isinstance(temperature, Tensor):
        # Reading a value from a GPU would make the CPU wait.
        value = "" if temperature.is_cuda else f" of {temperature.item():g}"
        temperature = f"a tensor{value}" + (" requiring grad" if temperature.requires_grad else "")
    return {
        "temperature": temperature,
        "stats": asked.stats is not None,
        "weights": asked.weights is not None,
        "margin": asked.false_negatives.margin,
        "candidates": "by row" if isinstance(candidates, Tensor) else candidates,
        "mask_own_negatives": "by row" if isinstance(masked, Tensor) else masked,
        "negatives": asked.negatives,
        "token_reduction": asked.token_reduction,
        "impl": "reference" if kernels is None else "tiled" if kernels is tiled else "fused",
        "objective": repr(asked.objective),
    }


# ---- checks


def find_error(asked: Problem, sides: Sides) -> str | None:
    """Return the first mistake in this rank's arguments, in words; None if there is none."""
    queries, passages = (vectors for vectors, _ in sides.values())
    return (
        _wrong_embeddings(queries, passages)
        or _wrong_tokens(asked, sides)
        or _wrong_positives(asked.positives, queries.shape[0], passages.shape[0], asked.group)
        or _wrong_temperature(asked.temperature)
        or _wrong_ids(asked.false_negatives, queries.shape[0], passages.shape[0])
        or _wrong_options(asked, queries.shape[-1], queries.shape[0])
    )


def _wrong_embeddings(queries: Tensor, passages: Tensor) -> str | None:
    for name, tensor in (("queries", queries), ("passages", passages)):
        if not isinstance(tensor, Tensor) or tensor.ndim not in (2, 3) or tensor.dtype not in DTYPES:
            return (
                f"{name} must be a floating-point tensor [rows, dimension] of float16, bfloat16, float32 or float64 "
                f"(late interaction: [rows, tokens, dimension]), got {describe(tensor)}"
            )
    if queries.ndim != passages.ndim:
        return (
            "queries and passages must both be one vector a text, or both several, got "
            f"{describe(queries)} and {describe(passages)}"
        )
    if queries.shape[-1] != passages.shape[-1] or queries.dtype != passages.dtype or queries.device != passages.device:
        return (
            "queries and passages must have the same dimension, dtype and device, got "
            f"{describe(queries)} on {queries.device} and {describe(passages)} on {passages.device}"
        )
    return None


def _wrong_tokens(asked: Problem, sides: Sides) -> str | None:
    if asked.token_reduction not in TOKEN_REDUCTIONS:
        return f"token_reduction must be {one_of(TOKEN_REDUCTIONS)}, got {asked.token_reduction!r}"
    for name, (vectors, mask) in sides.items():
        expected = list(vectors.shape[:2])
        if mask is not None and vectors.ndim == 2:
            return f"{name} is for late interaction; these embeddings are one vector a text, {describe(vectors)}"
        if mask is not None and not (isinstance(mask, Tensor) and list(mask.shape) == expected):
            return f"{name} must be a tensor {expected}, not 0 where a token is real, got {describe(mask)}"
    if any(vectors.ndim == 2 for vectors, _ in sides.values()):
        return None
    directions = asked.objective.directions if isinstance(asked.objective, Objective) else ()
    if others := sorted(set(directions) - {"query_to_passage", "passage_to_query"}):
        return f"late interaction compares queries with passages alone, got the directions {', '.join(others)}"
    if asked.negatives == "ring" and "passage_to_query" in directions:
        return 'late interaction in the ring has query_to_passage alone: use negatives="gather" for passage_to_query'
    return None


def _wrong_positives(positives: Any, num_queries: int, num_passages: int, group: ProcessGroup | None) -> str | None:
    if isinstance(positives, slice):  # the default
        if num_queries and (num_passages == 0 or num_passages % num_queries):
            return (
                f"{num_passages} passages cannot be split into equal groups for {num_queries} queries: pass "
                "positives=, the column of each query's positive, or as many passages for each query"
            )
        return None
    if not isinstance(positives, Tensor) or positives.dtype != torch.int64 or positives.shape != (num_queries,):
        return f"positives must be an int64 tensor [{num_queries}], one column a query, got {describe(positives)}"
    if num_queries == 0:
        return None
    if positives.is_cuda and collectives.world_size(group) == 1:
        # Reading the values would make the CPU wait for the GPU, and no other rank can hang.
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
            return f"temperature must be a float or a 0-d floating-point tensor, got {describe(temperature)}"
        if temperature.is_meta:
            return "temperature is on the meta device, where it has no value: pass a float or move it to the embeddings"
        if temperature.is_cuda:
            return None  # reading it would make the CPU wait for the GPU
        temperature = temperature.item()
    if not isinstance(temperature, Real) or not LEAST_TEMPERATURE <= float(temperature) < math.inf:
        return f"temperature must be positive and finite (0.01 to 0.1 for normalised embeddings), got {temperature!r}"
    return None


def _wrong_ids(ids: Any, num_queries: int, num_passages: int) -> str | None:
    if not isinstance(ids, FalseNegatives):
        return f"false_negatives must be FalseNegatives(...), got {describe(ids)}"
    expected = (
        ("passage_ids", 1, num_passages, f"[{num_passages}], one for each local passage"),
        ("query_ids", 1, num_queries, f"[{num_queries}], one for each local query"),
        ("positive_ids", 2, num_queries, f"[{num_queries}, K], padded with -1"),
    )
    for name, ndim, rows, words in expected:
        tensor = getattr(ids, name)
        fits = isinstance(tensor, Tensor) and tensor.dtype == torch.int64 and tensor.ndim == ndim
        if tensor is not None and not (fits and len(tensor) == rows):
            return (
                f"FalseNegatives.{name} must be an int64 tensor {words}, got {describe(tensor)}; "
                "inbatch.ids.stable_id makes an id of a string"
            )
    if ids.positive_ids is not None and ids.passage_ids is None:
        return "FalseNegatives.positive_ids needs passage_ids, the ids of the passages that they are compared with"
    if ids.margin is not None and not (isinstance(ids.margin, Real) and math.isfinite(ids.margin)):
        return f"FalseNegatives.margin must be a finite number in the units of q.p, or None, got {describe(ids.margin)}"
    return _wrong_groups(ids, num_queries)


def _wrong_groups(ids: FalseNegatives, num_queries: int) -> str | None:
    candidates, masked = ids.candidates, ids.mask_own_negatives
    if isinstance(candidates, Tensor):
        right = candidates.dtype == torch.int64 and candidates.shape == (num_queries,)
        right = right and bool(((candidates >= 0) & (candidates < len(CANDIDATES))).all())
    else:
        right = isinstance(candidates, str) and candidates in CANDIDATES
    if not right:
        return (
            f"FalseNegatives.candidates must be {one_of(CANDIDATES)}, or int64 [{num_queries}] of their places 0 to "
            f"{len(CANDIDATES) - 1}, got {describe(candidates)}"
        )
    by_row = isinstance(masked, Tensor) and masked.dtype == torch.bool and masked.shape == (num_queries,)
    if not by_row and not isinstance(masked, bool):
        return f"FalseNegatives.mask_own_negatives must be a bool, or bool [{num_queries}], got {describe(masked)}"
    return None


def _wrong_options(asked: Problem, dim: int, num_queries: int) -> str | None:
    if asked.negatives not in NEGATIVES:
        return f"negatives must be {one_of(NEGATIVES)}, got {asked.negatives!r}"
    if not isinstance(asked.objective, Objective):
        return f"objective must be an Objective(...) or None, got {describe(asked.objective)}"
    longest = max(asked.objective.matryoshka_dims or (0,))
    if longest > dim:
        return f"matryoshka_dims must not exceed the embeddings' dimension {dim}, got {asked.objective.matryoshka_dims}"
    chunk_mib = asked.chunk_mib
    if chunk_mib is not None and not (isinstance(chunk_mib, Real) and 0 < chunk_mib < math.inf):
        return f"chunk_mib must be a positive number of MiB, or None for the default, got {chunk_mib!r}"
    if asked.stats is not None and not isinstance(asked.stats, LossStats):
        return f"stats must be a LossStats() or None, got {describe(asked.stats)}"
    return wrong_weights(asked.weights, num_queries, "query")


def wrong_weights(weights: Any, rows: int, row: str) -> str | None:
    """Return the mistake in the weights of so many rows, in words; None if there is none."""
    if weights is None:
        return None
    fits = isinstance(weights, Tensor) and weights.is_floating_point() and weights.shape == (rows,)
    if fits and not weights.requires_grad and ((weights >= 0) & weights.isfinite()).all():
        return None
    return (
        f"weights must be floating-point [{rows}], one for each {row}, finite, not negative and not requiring grad, "
        f"got {describe(weights)}"
    )


def one_of(choices: tuple[str, ...]) -> str:
    """Return '"a", "b" or "c"'."""
    *first, last = (f'"{choice}"' for choice in choices)
    return f"{', '.join(first)} or {last}"


def describe(value: Any) -> str:
    """Return shape and dtype of a tensor, or type and value of anything else, for messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{type(value).__name__} {value!r}"[:80]
