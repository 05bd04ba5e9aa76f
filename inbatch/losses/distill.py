"""What a student learns of a teacher, exact over the ranks as `info_nce` is: the teacher's scores, or its vectors.

Shapes: B local queries, M local passages, N passages of all ranks, G of a row at most, C candidates (G or N),
D dimension, n local texts, t tokens of a query, T of a passage.
"""

import math
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from inbatch import collectives
from inbatch.losses.composed import gathered_texts
from inbatch.losses.info_nce import describe, find_error, one_of, wrong_weights
from inbatch.losses.max_sim import Sides, Spans, max_sim, packed, read_spans
from inbatch.losses.softmax import Problem

OVER = ("group", "pool")
KINDS = ("cosine", "mse")
_NEVER = -1e30  # as a score: its share is exactly 0, and no infinity meets another


@collectives.uncompiled
def distill(
    queries: Tensor,
    passages: Tensor,
    teacher_scores: Tensor,
    *,
    over: str = "group",
    positives: Tensor | None = None,
    temperature: float | Tensor = 0.02,
    teacher_temperature: float = 1.0,
    group: ProcessGroup | None = None,
    weights: Tensor | None = None,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    token_reduction: str = "sum",
) -> Tensor:
    """Compute the mean over the queries of all ranks of KL(teacher || student), sum_{j in C(i)} a_ij log(a_ij / b_ij).

        a_i = softmax_j(teacher_scores_ij / teacher_temperature),    b_i = softmax_j(q_i . p_j / temperature)

    over: what C(i) is. "group": teacher_scores [B, G] are of the passages from the row's positive on, in their order.
        "pool": [B, N], of the passages of all ranks in rank order; [B, N] is held whole. NaN: no candidate of the row;
        a row of NaN alone adds 0 to the mean. teacher_scores get no gradient.
    queries, passages, positives, temperature, weights, the masks and token_reduction (late interaction) as in
    `info_nce`, beside which it is added: `info_nce(q, p) + weight * distill(q, p, scores)`, in one GradCache loss too.

    A bi-encoder's scores over the pool: `teacher_queries @ collectives.all_gather(teacher_passages).T`.
    Returns a 0-d tensor, float32 (float64 for float64 inputs), scaled for the mean over ranks as `info_nce`'s is.
    Raises ValueError, on every rank, for wrong or disagreeing inputs. (Hinton et al. 2015; Lin et al. 2021)
    """
    if isinstance(temperature, Real):
        temperature = float(temperature)  # NumPy's, too
    asked = Problem(
        temperature=temperature,
        group=group,
        positives=slice(None) if positives is None else positives,
        weights=weights,
        token_reduction=token_reduction,
    )
    sides = {"query_mask": (queries, query_mask), "passage_mask": (passages, passage_mask)}
    error = find_error(asked, sides) or _wrong_teacher(teacher_scores, teacher_temperature, over, len(queries))
    spans: list[Spans] = []
    if error is None and queries.ndim == 3:
        spans, error = read_spans(sides)
    column_B = asked.positives
    if error is None:
        if not isinstance(column_B, Tensor):
            column_B = torch.arange(len(queries)) * (len(passages) // max(1, len(queries)))
        error = _beyond(teacher_scores, column_B, len(passages), over)
    known = error is None  # what is wrong cannot be relied on to describe itself
    student = "a tensor" if isinstance(temperature, Tensor) else temperature
    counts = collectives.agree(
        "distill",
        {"queries": queries, "passages": passages} if known else {},
        group=group,
        same={"over": over, "temperatures": f"{student}, {teacher_temperature}", "weights": weights is not None},
        sizes={"scores": teacher_scores.shape[1]} if known else {},
        ragged=("queries", "passages") if known and queries.ndim == 3 else (),
        error=error,
    )
    assert isinstance(column_B, Tensor)
    for rank, width in enumerate(counts["scores"]):
        if over == "pool" and width != sum(counts["passages"]):
            raise ValueError(
                f"teacher_scores must have a column for each of the {sum(counts['passages'])} passages of all ranks, "
                f"got {width} on rank {rank}"
            )
    share = _share(counts["queries"], "distill", "queries")
    wide = torch.promote_types(queries.dtype, torch.float32)
    teacher_BC = teacher_scores.detach().to(queries.device, wide, non_blocking=True)
    with torch.autocast(queries.device.type, enabled=False):
        if over == "pool":
            score_BC = _pool_scores(queries, passages, counts["passages"], asked, spans)
        else:
            column_B = column_B.to(queries.device, non_blocking=True)
            score_BC = _group_scores(sides, column_B, teacher_BC.shape[1], mean=token_reduction == "mean")
        loss_B = _divergence(teacher_BC / float(teacher_temperature), score_BC / temperature)
        return (loss_B if weights is None else loss_B * weights.to(loss_B, non_blocking=True)).sum() * share


@collectives.uncompiled
def match_vectors(
    embeddings: Tensor,
    teacher_vectors: Tensor,
    *,
    kind: str = "cosine",
    weights: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute the mean over the texts of all ranks of 1 - cos(e_i, t_i) ("cosine") or mean_d (e_id - t_id)^2 ("mse").

    embeddings, teacher_vectors [n, D]: of the same texts, such as a rank's queries and passages together; n may differ
    by rank and may be 0. weights [n], not negative, multiply the texts' terms. A teacher of another dimension needs a
    projection of the student's vectors, which is trained too.
    Returns, and raises, as `distill`. No gradient goes to teacher_vectors.
    """
    error, both = None, (embeddings, teacher_vectors)
    if kind not in KINDS:
        error = f"kind must be {one_of(KINDS)}, got {kind!r}"
    elif not all(isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point() for x in both):
        given = " and ".join(map(describe, both))
        error = f"embeddings and teacher_vectors must be floating-point tensors [n, D], got {given}"
    elif embeddings.shape != teacher_vectors.shape:
        error = (
            f"embeddings {tuple(embeddings.shape)} and teacher_vectors {tuple(teacher_vectors.shape)} must be alike: "
            "project the embeddings to the teacher's dimension"
        )
    else:
        error = wrong_weights(weights, len(embeddings), "text")
    fields = {"embeddings": embeddings} if error is None else {}
    counts = collectives.agree(
        "match_vectors", fields, group=group, same={"kind": kind, "weights": weights is not None}, error=error
    )["embeddings"]
    share = _share(counts, "match_vectors", "texts")
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    with torch.autocast(embeddings.device.type, enabled=False):
        ours, theirs = embeddings.to(wide), teacher_vectors.detach().to(embeddings.device, wide, non_blocking=True)
        loss_n = 1 - F.cosine_similarity(ours, theirs) if kind == "cosine" else (ours - theirs).square().mean(1)
        return (loss_n if weights is None else loss_n * weights.to(loss_n, non_blocking=True)).sum() * share


def _divergence(teacher_BC: Tensor, student_BC: Tensor) -> Tensor:
    """Return KL(teacher || student) by row [B], of scaled scores; NaN where the teacher has none."""
    absent_BC = teacher_BC.isnan()
    log_a_BC, log_b_BC = (x.masked_fill(absent_BC, _NEVER).log_softmax(1) for x in (teacher_BC, student_BC))
    return (log_a_BC.exp() * (log_a_BC - log_b_BC)).sum(1)


def _share(counts: list[int], name: str, what: str) -> float:
    """Return what a row counts in the mean over ranks: W / (rows of all ranks)."""
    if not sum(counts):
        raise ValueError(f"{name} has no {what} on any rank: the mean over none is undefined; skip this batch")
    return len(counts) / sum(counts)


def _wrong_teacher(scores: Any, teacher_temperature: Any, over: Any, num_queries: int) -> str | None:
    if over not in OVER:
        return f"over must be {one_of(OVER)}, got {over!r}"
    if not (isinstance(teacher_temperature, Real) and 0 < float(teacher_temperature) < math.inf):
        return f"teacher_temperature must be a positive number, got {teacher_temperature!r}"
    right = isinstance(scores, Tensor) and scores.is_floating_point() and scores.ndim == 2
    if not right or len(scores) != num_queries:
        return f"teacher_scores must be floating-point [{num_queries}, candidates], got {describe(scores)}"
    if not scores.is_cuda and scores.isinf().any():  # not read on a GPU, for which the CPU would wait
        return "teacher_scores hold infinity; expected numbers, and NaN where a passage is no candidate"
    return None


def _beyond(scores: Tensor, column_B: Tensor, num_passages: int, over: str) -> str | None:
    """Return what is wrong where a score is of no passage. Not read on a GPU: the CPU would wait for it."""
    if over == "pool" or scores.is_cuda or column_B.is_cuda:
        return None
    reach_BC = column_B[:, None] + torch.arange(scores.shape[1])
    if ((reach_BC >= num_passages) & ~scores.isnan()).any():
        return f"teacher_scores go on beyond the last of {num_passages} passages: fill a row up with NaN"
    return None


def _pool_scores(queries: Tensor, passages: Tensor, counts: list[int], asked: Problem, spans: list[Spans]) -> Tensor:
    """Return the similarities [B, N] with the passages of all ranks."""
    if queries.ndim == 2:
        wide = torch.promote_types(queries.dtype, torch.float32)
        passages = collectives.all_gather(passages, asked.group, rows=counts)
        return queries.to(wide) @ passages.to(wide).T
    texts = gathered_texts(packed(passages, spans[1]), counts, asked.group)
    return max_sim(packed(queries, spans[0]), texts, mean=asked.token_reduction == "mean")


def _group_scores(sides: Sides, first_B: Tensor, width: int, *, mean: bool) -> Tensor:
    """Return the similarities [B, G] with `width` passages from the row's first on."""
    (queries, query_mask), (passages, passage_mask) = sides.values()
    place_BG = first_B[:, None] + torch.arange(width, device=queries.device)
    place_BG = place_BG.clamp(max=max(0, len(passages) - 1))  # beyond the last one there are no scores
    wide = torch.promote_types(queries.dtype, torch.float32)
    if queries.ndim == 2:
        return torch.einsum("bd,bgd->bg", queries.to(wide), passages[place_BG].to(wide))
    grid_BGtT = torch.einsum("btd,bgsd->bgts", queries.to(wide), passages[place_BG].to(wide))
    if passage_mask is not None:
        masked_BGT = (passage_mask.to(grid_BGtT.device) == 0)[place_BG]
        grid_BGtT = grid_BGtT.masked_fill(masked_BGT[:, :, None], -math.inf)
    best_BGt = grid_BGtT.max(3).values
    real_Bt = torch.ones_like(queries[..., 0], dtype=wide) if query_mask is None else (query_mask != 0).to(best_BGt)
    total_BG = (best_BGt * real_Bt[:, None]).sum(2)
    return total_BG / real_Bt.sum(1, keepdim=True) if mean else total_BG
