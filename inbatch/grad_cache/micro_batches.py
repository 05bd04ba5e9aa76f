"""Micro-batches under a token budget, cut from whole batches sorted by length.

Shapes: B rows of one batch, T its padded length, R rows of several batches, b rows of one batch within a micro-batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]
MASK = "attention_mask"
EMBEDDINGS = "inputs_embeds"
PATCH = 768  # numbers that count as one token in a row without a mask: a vision transformer's patch of 16 x 16 x 3


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Hold rows of a batch, and the columns [start, stop) of all their tokens; columns that it lacks are padding."""

    batch: int
    rows_b: Tensor
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Hold `rows` rows of `width` tokens, of which `tokens` are encoded. Without pieces: a row of zero weight."""

    pieces: tuple[Piece, ...]
    rows: int
    width: int
    tokens: int


def check_batches(batches: Sequence[Batch]) -> None:
    """Raise ValueError unless every batch maps names to tensors of as many rows, or to plain numbers and strings."""
    if not batches:
        raise ValueError("GradCache: no batch given; call step(queries, passages)")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"GradCache: batch {number} must be a mapping of tensors, got {type(batch).__name__}")
        for name, value in batch.items():
            if not isinstance(value, (Tensor, int, float, str, type(None))):
                raise ValueError(
                    f"GradCache: batch {number} must be a mapping of tensors, got {type(value).__name__} for '{name}'; "
                    "leave it out, or make it a tensor of as many rows as the others"
                )
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ValueError(f"GradCache: batch {number} holds no tensor, only {sorted(batch)}")
        mask = batch.get(MASK)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(
                f"GradCache: batch {number} needs a two-dimensional '{MASK}' [rows, tokens], or none where nothing is "
                f"padded, got {got}; row lengths are read from it"
            )
        first = next(iter(tensors)) if mask is None else MASK
        for name, value in tensors.items():
            if value.ndim == 0 or value.shape[:1] != tensors[first].shape[:1]:
                raise ValueError(
                    f"GradCache: batch {number} holds '{name}' of shape {tuple(value.shape)} beside "
                    f"{count_rows(batch)} rows of '{first}'; dim 0 must be equal"
                )


def count_rows(batch: Batch) -> int:
    mask = batch.get(MASK)
    some = next(value for value in batch.values() if isinstance(value, Tensor)) if mask is None else mask
    return some.shape[0] if some.ndim else 0


def spans(batch: Batch) -> Tensor:
    """Return [2, B] on the CPU: each row's first column with a token and one past its last (T and 0 if it has none).

    Without a mask all rows of a batch are equally long: T where integers [B, T] are its tokens, else one token for
    every PATCH numbers.
    """
    used_BT = batch.get(MASK)
    if used_BT is None:
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        numbers = sum(value[:1].numel() for value in tensors if value.is_floating_point()) // PATCH
        tokens = max((value.shape[1] for value in tensors if value.ndim == 2 and _is_whole(value)), default=0)
        return torch.tensor([[0], [max(1, numbers, tokens)]]).repeat(1, count_rows(batch))
    used_BT, width = used_BT.bool(), used_BT.shape[1]
    if width == 0:
        return torch.zeros(2, len(used_BT), dtype=torch.int64)
    # Products of narrow integers: on the CPU a tenth of the time that selecting takes.
    columns_T = torch.arange(width, dtype=torch.int32, device=used_BT.device)
    first_B = width - (used_BT * (width - columns_T)).amax(1)
    stop_B = (used_BT * (columns_T + 1)).amax(1)
    return torch.stack([first_B, stop_B]).long().cpu()


def _is_whole(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()


def cut(batches: Sequence[Batch], *, budget: int | None, multiple: int, packed: bool = False) -> list[MicroBatch]:
    """Sort the rows of all batches by length, longest first, and cut where their tokens would exceed the budget.

    These are rows x longest, or what the rows are long together where encoding is packed. None cuts nothing but keeps
    the batches apart, as a plain step would. A width is rounded up to `multiple` as far as the batch has columns. At
    least one micro-batch comes back: with no rows at all it is a placeholder.
    """
    spans_2B = [spans(batch) for batch in batches]
    batch_R = torch.cat([torch.full((span.shape[1],), number) for number, span in enumerate(spans_2B)])
    row_R = torch.cat([torch.arange(span.shape[1]) for span in spans_2B])
    lengths_R = torch.cat([(span[1] - span[0]).clamp(min=1) for span in spans_2B])
    if budget is None:
        sizes = [span.shape[1] for span in spans_2B]
    else:
        lengths_R, order_R = lengths_R.sort(descending=True, stable=True)
        batch_R, row_R, sizes, start = batch_R[order_R], row_R[order_R], [], 0
        columns = max(_columns(batch, span) for batch, span in zip(batches, spans_2B, strict=True))
        totals_R = lengths_R.cumsum(0)
        while start < len(row_R):
            longest = int(lengths_R[start])
            if packed:
                stop = int(torch.searchsorted(totals_R, int(totals_R[start]) - longest + budget, right=True))
            else:
                stop = min(len(row_R), start + budget // _rounded(longest, multiple, columns))
            sizes.append(max(1, stop - start))
            start += sizes[-1]
    out = []
    for owners, rows, lengths in zip(batch_R.split(sizes), row_R.split(sizes), lengths_R.split(sizes), strict=True):
        chosen = [(number, rows[owners == number]) for number in range(len(batches))]
        if len(rows):
            tokens = int(lengths.sum()) if packed else None
            out.append(_micro_batch(batches, spans_2B, [pair for pair in chosen if len(pair[1])], multiple, tokens))
    return out or [placeholder(1)]


def placeholder(width: int) -> MicroBatch:
    """Return a row of zero weight, so that every rank encodes equally often."""
    return MicroBatch(pieces=(), rows=0, width=width, tokens=width)


def _micro_batch(
    batches: Sequence[Batch],
    spans_2B: list[Tensor],
    chosen: list[tuple[int, Tensor]],
    multiple: int,
    tokens: int | None,
) -> MicroBatch:
    used = [(int(spans_2B[n][0, rows_b].min()), int(spans_2B[n][1, rows_b].max())) for n, rows_b in chosen]
    columns = [_columns(batches[n], spans_2B[n]) for n, _ in chosen]
    width = _rounded(max(stop - start for start, stop in used), multiple, max(columns))
    pieces = []
    for (number, rows_b), (start, stop), total in zip(chosen, used, columns, strict=True):
        # The window grows into the batch's own padding first: to the left where that is where the padding lies.
        on_left = start > 0 and stop == total
        start = total - width if on_left else min(start, max(0, total - width))
        pieces.append(Piece(batch=number, rows_b=rows_b, start=start, stop=start + width))
    rows = sum(len(rows_b) for _, rows_b in chosen)
    return MicroBatch(pieces=tuple(pieces), rows=rows, width=width, tokens=rows * width if tokens is None else tokens)


def _columns(batch: Batch, span_2B: Tensor) -> int:
    mask = batch.get(MASK)
    return mask.shape[1] if mask is not None else int(span_2B[1].max()) if span_2B.numel() else 0


def _rounded(length: int, multiple: int, columns: int) -> int:
    return max(1, length, min(-(-length // multiple) * multiple, columns))


def take(batches: Sequence[Batch], micro_batch: MicroBatch) -> dict[str, Any]:
    """Select the micro-batch's rows; those of tokens are trimmed along dim 1, new padding is 0.

    Numbers and strings are taken from the first batch: the caller mixes no batches in which they differ.
    """
    parts = [_take_piece(batches[piece.batch], piece) for piece in micro_batch.pieces]
    if not parts:
        return {name: _placeholder_of(name, value, batches[0], micro_batch.width) for name, value in batches[0].items()}
    if any(part.keys() != parts[0].keys() for part in parts):
        names = [sorted(part) for part in parts]
        raise ValueError(f"GradCache: batches that share an encoder must hold the same tensors, got {names}")
    if len(parts) == 1:
        return parts[0]
    return {
        name: torch.cat([part[name] for part in parts]) if isinstance(value, Tensor) else value
        for name, value in parts[0].items()
    }


def _of_tokens(name: str, value: Tensor, batch: Batch) -> bool:
    """Return True if dim 1 counts tokens. A floating-point feature of a row may happen to be as wide as the mask."""
    mask = batch.get(MASK)
    if mask is None or value.ndim < 2 or value.shape[1] != mask.shape[1]:
        return False
    return _is_whole(value) or name == MASK or (name == EMBEDDINGS and value.ndim == 3)


def _placeholder_of(name: str, value: Any, batch: Batch, width: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = (width, *value.shape[2:]) if _of_tokens(name, value, batch) else value.shape[1:]
    return value.new_full((1, *shape), int(name == MASK))


def _take_piece(batch: Batch, piece: Piece) -> dict[str, Any]:
    part, rows = dict(batch), piece.rows_b
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            continue
        if rows.device != value.device:
            rows = on_device(piece.rows_b, value.device)
        if not _of_tokens(name, value, batch):
            part[name] = value.index_select(0, rows)
            continue
        left, right = max(0, -piece.start), max(0, piece.stop - value.shape[1])
        value = value[:, max(0, piece.start) : piece.stop].index_select(0, rows)
        if left or right:
            value = torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (left, right))
        part[name] = value
    return part


def on_device(rows: Tensor, device: torch.device) -> Tensor:
    """Copy indices to a device; pinned, since the CPU would wait for the GPU to copy pageable memory."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
