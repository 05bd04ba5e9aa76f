"""Micro-batches under a token budget, cut from a whole local batch sorted by length.

Shapes: B rows of one batch, T its padded length, R rows of all batches that share an encoder, L a micro-batch's width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inbatch.grad_cache.memory import to_device

Batch = Mapping[str, Tensor]
MASK = "attention_mask"
EMBEDDINGS = "inputs_embeds"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The rows of one batch inside a micro-batch, and the columns that hold all their tokens."""

    batch: int
    rows_b: Tensor
    start: int
    stop: int
    left: int  # columns of padding to add, where the batch itself is narrower than the micro-batch
    right: int


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """`rows` rows of width `width`; no piece at all stands for a placeholder row that counts for nothing."""

    pieces: tuple[Piece, ...]
    rows: int
    width: int

    @property
    def tokens(self) -> int:
        return max(self.rows, 1) * self.width


def check_batches(batches: Sequence[Batch]) -> None:
    """ValueError unless every batch is a mapping of tensors with equal dim 0 and a [B, T] attention mask."""
    if not batches:
        raise ValueError("GradCache: no batch given; call step(queries, passages)")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"GradCache: batch {number} must be a mapping of tensors, got {type(batch).__name__}")
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"GradCache: batch {number} must be a mapping of tensors, got {type(value).__name__} for '{name}'; "
                    "leave it out, or make it a tensor of as many rows as the others"
                )
        mask_BT = batch.get(MASK)
        if mask_BT is None or mask_BT.ndim != 2:
            shape = "none" if mask_BT is None else str(tuple(mask_BT.shape))
            raise ValueError(
                f"GradCache: batch {number} needs a two-dimensional '{MASK}' [rows, tokens], got {shape}; "
                "row lengths are read from it (all ones where nothing is padded)"
            )
        for name, value in batch.items():
            if value.ndim == 0 or value.shape[0] != mask_BT.shape[0]:
                raise ValueError(
                    f"GradCache: batch {number} holds '{name}' of shape {tuple(value.shape)} beside "
                    f"{mask_BT.shape[0]} rows of '{MASK}'; dim 0 must be equal"
                )


def spans(batch: Batch) -> Tensor:
    """[2, B] on the CPU: the first column of each row with a token and one past the last (T and 0 in an empty row)."""
    used_BT = batch[MASK].bool()
    width = used_BT.shape[1]
    if width == 0:
        return torch.zeros(2, len(used_BT), dtype=torch.int64)
    # Products of narrow integers: on the CPU a tenth of the time that selecting takes.
    columns_T = torch.arange(width, dtype=torch.int32, device=used_BT.device)
    first_B = width - (used_BT * (width - columns_T)).amax(1)
    stop_B = (used_BT * (columns_T + 1)).amax(1)
    return torch.stack([first_B, stop_B]).long().cpu()


def cut(batches: Sequence[Batch], *, budget: int | None, multiple: int) -> list[MicroBatch]:
    """Sort the rows of all batches by length, longest first, and cut where rows x longest would exceed the budget.

    None cuts nothing but keeps the batches apart, as a plain step would. A width is rounded up to `multiple` as far as
    the batch has columns. At least one micro-batch comes back: with no rows at all it is a placeholder.
    """
    spans_2B = [spans(batch) for batch in batches]
    if sum(span.shape[1] for span in spans_2B) == 0:
        return [placeholder(1)]
    if budget is None:
        whole = [(number, torch.arange(span.shape[1])) for number, span in enumerate(spans_2B) if span.shape[1]]
        return [_micro_batch(batches, spans_2B, [piece], multiple) for piece in whole]
    lengths_R = torch.cat([(span[1] - span[0]).clamp(min=1) for span in spans_2B])
    owner_R = torch.cat([torch.full((span.shape[1],), number) for number, span in enumerate(spans_2B)])
    row_R = torch.cat([torch.arange(span.shape[1]) for span in spans_2B])
    lengths_R, order_R = lengths_R.sort(descending=True, stable=True)
    owner_R, row_R = owner_R[order_R], row_R[order_R]
    out, start, total = [], 0, len(order_R)
    while start < total:
        longest = -(-int(lengths_R[start]) // multiple) * multiple
        stop = min(total, start + max(1, budget // longest))
        owners, rows = owner_R[start:stop], row_R[start:stop]
        pieces = [(number, rows[owners == number]) for number in range(len(batches))]
        out.append(_micro_batch(batches, spans_2B, [piece for piece in pieces if len(piece[1])], multiple))
        start = stop
    return out


def placeholder(width: int) -> MicroBatch:
    """A row that counts for nothing: every rank encodes equally often."""
    return MicroBatch(pieces=(), rows=0, width=width)


def _micro_batch(batches, spans_2B, chosen, multiple: int) -> MicroBatch:
    boxes = []
    for number, rows_b in chosen:
        width = batches[number][MASK].shape[1]
        start, stop = int(spans_2B[number][0, rows_b].min()), int(spans_2B[number][1, rows_b].max())
        start, stop = (start, stop) if start < stop else (0, min(1, width))
        boxes.append((number, rows_b, start, stop, width))
    longest = max(stop - start for *_, start, stop, _ in boxes)
    rounded = -(-longest // multiple) * multiple
    longest = max(longest, min(rounded, max(width for *_, width in boxes)))
    pieces = []
    for number, rows_b, start, stop, width in boxes:
        # Grow the window into the batch's own padding first: to the left where that is where the padding lies.
        on_left = start > 0 and stop == width
        if on_left:
            start = max(0, stop - longest)
        stop = min(width, start + longest)
        start = max(0, stop - longest)
        missing = longest - (stop - start)
        left, right = (missing, 0) if on_left else (0, missing)
        pieces.append(Piece(batch=number, rows_b=rows_b, start=start, stop=stop, left=left, right=right))
    return MicroBatch(pieces=tuple(pieces), rows=sum(len(piece.rows_b) for piece in pieces), width=longest)


def take(batches: Sequence[Batch], micro_batch: MicroBatch) -> dict[str, Tensor]:
    """The micro-batch's tensors: rows selected, those of tokens trimmed along dim 1, new padding 0."""
    if not micro_batch.pieces:
        return {
            name: torch.full(_trimmed_shape(name, value, batches[0], micro_batch.width), int(name == MASK)).to(value)
            for name, value in batches[0].items()
        }
    parts = [_take_piece(batches[piece.batch], piece) for piece in micro_batch.pieces]
    if any(part.keys() != parts[0].keys() for part in parts):
        names = [sorted(part) for part in parts]
        raise ValueError(f"GradCache: batches that share an encoder must hold the same tensors, got {names}")
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_tokens(name: str, value: Tensor, batch: Batch) -> bool:
    """Whether dim 1 counts tokens. A floating-point feature of a row may happen to be as wide as the mask."""
    if value.ndim < 2 or value.shape[1] != batch[MASK].shape[1]:
        return False
    floating = value.is_floating_point() or value.is_complex()
    return not floating or name == MASK or (name == EMBEDDINGS and value.ndim == 3)


def _trimmed_shape(name: str, value: Tensor, batch: Batch, width: int) -> tuple[int, ...]:
    return (1, width, *value.shape[2:]) if _of_tokens(name, value, batch) else (1, *value.shape[1:])


def _take_piece(batch: Batch, piece: Piece) -> dict[str, Tensor]:
    places: dict[torch.device, Tensor] = {}
    part = {}
    for name, value in batch.items():
        if value.device not in places:
            places[value.device] = to_device(piece.rows_b, value.device)
        rows = places[value.device]
        if _of_tokens(name, value, batch):
            value = value[:, piece.start : piece.stop].index_select(0, rows)
            if piece.left or piece.right:
                pad = (0, 0) * (value.ndim - 2) + (piece.left, piece.right)
                value = torch.nn.functional.pad(value, pad)
        else:
            value = value.index_select(0, rows)
        part[name] = value
    return part
