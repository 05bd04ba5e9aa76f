"""Drop-in for `nemo_automodel.components.models.common.inbatch_neg_utils`: change the import, keep the code.

Same names, parameters, defaults and semantics, over this library's collectives and on the default process group.
Added: ranks may hold different numbers of rows, or none, in a gather; and where ranks disagree on what they gather (one
has None, or another dtype, trailing shape or requires_grad), every rank raises the same ValueError instead of hanging.
Labels computed as `(rank * local_batch_size + i) * train_n_passages` are right for equal ranks only, as the mask's are:
with other numbers take `positive_columns`.
For exact gradients by default, ids that may be unknown and any process group, see `inbatch.info_nce`.

Legend: B local queries, N gathered passages.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from inbatch import collectives


def _all_gather_tensor(t: Tensor, preserve_grad: bool = False) -> Tensor:
    """`dist_gather_tensor` for a tensor that is there."""
    return _gather("_all_gather_tensor", t, preserve_grad)  # pyright: ignore[reportReturnType]


def dist_gather_tensor(t: Tensor | None, preserve_grad: bool = False) -> Tensor | None:
    """All-gathers `t` [R, ...] along dim 0, in rank order. None on every rank gives None.

    Returns [sum of R, ...]; `t` itself when not distributed or with one process.

    Gradient: with preserve_grad, d t is the sum over ranks of what their copies of it received. Without, the slices of
    other ranks are detached and only this rank's own carries gradient. A `t` that requires no grad (ids, masks) is
    gathered detached in either case.

    Raises ValueError on every rank if ranks disagree (see the module), or any rank has a 0-d tensor.
    """
    return _gather("dist_gather_tensor", t, preserve_grad)


def dist_gather_tensor_with_dim1_padding(
    t: Tensor | None, padding_value: int | float | bool = 0, preserve_grad: bool = False
) -> Tensor | None:
    """Pads dim 1 of `t` [R, T, ...] on the right to the longest rank's T with padding_value, then all-gathers dim 0.

    Otherwise as `dist_gather_tensor`; `t` must have two dimensions or more.
    """
    return _gather("dist_gather_tensor_with_dim1_padding", t, preserve_grad, padding_value)


@collectives.uncompiled
def _gather(what: str, t: Tensor | None, preserve_grad: bool, padding_value: int | float | bool | None = None):
    if collectives.world_size() == 1:
        return t
    pads = padding_value is not None
    counts = collectives.agree(
        what,
        {"t": t if isinstance(t, Tensor) else None},
        same={"preserve_grad": bool(preserve_grad)},
        ragged=("t",) if pads else (),
        error=_input_error(what, t, 2 if pads else 1, padding_value),
    )
    if t is None:
        return None
    if pads and (missing := max(counts["t, dim 1"]) - t.shape[1]):
        t = F.pad(t, [0, 0] * (t.ndim - 2) + [0, missing], value=padding_value)
    rows = counts["t"]
    if preserve_grad or not t.requires_grad:
        return collectives.all_gather(t, rows=rows)
    gathered = collectives.all_gather(t.detach(), rows=rows)
    start = sum(rows[: collectives.rank()])
    gathered[start : start + t.shape[0]] = t  # the same values, now connected to the graph
    return gathered


def _input_error(what: str, t, min_dims: int, padding_value) -> str | None:
    if t is None:
        return None
    if not isinstance(t, Tensor):
        return f"{what}: expected a tensor or None, got {type(t).__name__}"
    if t.ndim < min_dims:
        return f"{what}: expected a tensor with {min_dims} dimensions or more, got shape {tuple(t.shape)}"
    if padding_value is not None:
        try:
            torch.full((), padding_value, dtype=t.dtype)
        except (RuntimeError, TypeError) as exception:
            return f"{what}: padding_value {padding_value!r} does not fit dtype {t.dtype}: {exception}"
    return None


@collectives.uncompiled
def positive_columns(local_batch_size: int, train_n_passages: int, device: torch.device | None = None) -> Tensor:
    """Return [local_batch_size] int64, the column of each row's positive among the gathered passages.

        column(i) = (rows of the ranks before this one + i) * train_n_passages

    These are the labels for cross-entropy over gathered passages, for equal and for unequal numbers of rows. Every rank
    calls it. device: of the result; None is the CPU.

    Raises ValueError, on every rank, for a negative number of rows or passages that are not at least 1 and equal.
    """
    error = None
    if local_batch_size < 0 or train_n_passages < 1:
        error = (
            "positive_columns: expected local_batch_size of at least 0 and train_n_passages of at least 1, got "
            f"{local_batch_size} and {train_n_passages}"
        )
    same, sizes = {"train_n_passages": train_n_passages}, {"rows": local_batch_size}
    rows = collectives.agree("positive_columns", same=same, sizes=sizes, error=error)["rows"]
    start = sum(rows[: collectives.rank()])
    return torch.arange(start, start + local_batch_size, device=device) * train_n_passages


def mask_gathered_passages_same_doc_as_positive(
    scores: Tensor, passage_doc_ids: Tensor, train_n_passages: int, rank: int, local_batch_size: int
) -> None:
    """Sets `scores` in place to finfo(dtype).min where another passage is the same document as the row's positive.

        positive(i) = (rank * local_batch_size + i) * train_n_passages
        scores[i, j] = finfo.min    where passage_doc_ids[j] == passage_doc_ids[positive(i)] and j != positive(i)

    scores: [B, N] floating point, this rank's query rows; B = local_batch_size on every rank, N = W B train_n_passages.
    passage_doc_ids: [N] int64. Every value is an id, -1 too. train_n_passages counts the positive and its negatives.

    Masked scores receive no gradient. Divide by the temperature before masking: finfo.min divided by a temperature
    below 1 is -inf, which a learnable temperature turns into NaN gradients.

    Raises ValueError for another shape, dtype or device, for positives outside the N columns, and where N shows that
    ranks hold different numbers of rows: their positives lie elsewhere (`positive_columns`; `info_nce` masks them too).
    """
    error = _mask_error(scores, passage_doc_ids, train_n_passages, rank, local_batch_size)
    if error is not None:
        raise ValueError(f"mask_gathered_passages_same_doc_as_positive: {error}")
    rows_B = torch.arange(local_batch_size, device=scores.device)
    positives_B = (rank * local_batch_size + rows_B) * train_n_passages
    same_BN = passage_doc_ids[positives_B][:, None] == passage_doc_ids
    same_BN[rows_B, positives_B] = False
    scores.masked_fill_(same_BN, torch.finfo(scores.dtype).min)


def _mask_error(scores: Tensor, ids: Tensor, train_n_passages: int, rank: int, local_batch_size: int) -> str | None:
    if scores.ndim != 2 or not scores.is_floating_point():
        return f"scores must be [local_batch_size, N] floating point, got {tuple(scores.shape)} {scores.dtype}"
    columns = scores.shape[1]
    if ids.shape != (columns,) or ids.dtype != torch.int64 or ids.device != scores.device:
        return (
            f"passage_doc_ids must be [{columns}] torch.int64 on {scores.device}, one id per column of scores, "
            f"got {tuple(ids.shape)} {ids.dtype} on {ids.device}"
        )
    if train_n_passages < 1 or columns % train_n_passages:
        return f"train_n_passages must be at least 1 and divide the {columns} columns of scores, got {train_n_passages}"
    if local_batch_size != scores.shape[0]:
        return f"local_batch_size is {local_batch_size} but scores has {scores.shape[0]} rows: pass this rank's rows"
    if rank < 0 or (rank + 1) * local_batch_size * train_n_passages > columns:
        return (
            f"rank {rank} with {local_batch_size} queries of {train_n_passages} passages needs "
            f"{(rank + 1) * local_batch_size * train_n_passages} columns, scores has {columns}"
        )
    if local_batch_size == 0:
        return None
    ranks, rest = divmod(columns, local_batch_size * train_n_passages)
    if rest or (collectives.world_size() > 1 and ranks != collectives.world_size()):
        return (
            f"{columns} columns are not {local_batch_size} queries of {train_n_passages} passages on every rank, which "
            "this function takes for granted; use info_nce(..., false_negatives=FalseNegatives(passage_ids)), or drop "
            "the last, uneven batch"
        )
    return None
