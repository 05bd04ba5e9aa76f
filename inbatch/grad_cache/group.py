"""The batches that share micro-batches, their encoding, and the way back from rows of batches to micro-batches.

Shapes: B rows of one batch, R rows of all batches of a group, b rows of a micro-batch, D dimension; embeddings may have
further dimensions in between, of which the first (T, tokens) may differ between micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from inbatch.grad_cache.memory import PassState
from inbatch.grad_cache.micro_batches import Batch, MicroBatch, count_rows, on_device, take

Encode = Callable[[dict[str, Any]], Tensor]


@dataclass
class Pass:
    """Hold a micro-batch's first encoding: the state before it, and its output, with the graph where that is kept."""

    micro_batch: MicroBatch
    state: PassState
    output: Tensor


class Group:
    """Hold batches of the same encode, equal numbers and equal strings: their rows may share micro-batches."""

    def __init__(self, encode: Encode, constants: dict[str, Any]):
        self.encode = encode
        self.constants = constants
        self.batches: list[Batch] = []
        self.numbers: list[int] = []  # the batches' places among the step's
        self.passes: list[Pass] = []
        self.trains = False
        self.leaves: list[Tensor] = []  # behind the first output

    def encoded(self, micro_batch: MicroBatch) -> Tensor:
        """Encode a micro-batch, with a graph where grad mode is on; ValueError for an output that does not fit."""
        output = self.encode(take(self.batches, micro_batch))
        rows = max(micro_batch.rows, 1)
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != rows:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"GradCache: encode must return one embedding a row, [{rows}, D]; got {got}")
        first = self.passes[0].output if self.passes else output
        same_from = 1 if output.ndim == 2 else 2  # the number of tokens may differ
        if output.shape[same_from:] != first.shape[same_from:] or output.ndim != first.ndim:
            shapes = f"{tuple(first.shape)} and {tuple(output.shape)}"
            raise ValueError(f"GradCache: encode must return equally shaped embeddings for all rows; got {shapes}")
        return output

    def embeddings(self) -> list[Tensor]:
        """Return [B, D] or [B, T, D] of every batch, without a graph, where rows lack tokens filled up with zeros."""
        widest = self._widest()
        rows_R = torch.cat([_widened(p.output.detach()[: p.micro_batch.rows], widest) for p in self.passes])
        in_order_R = torch.empty_like(rows_R).index_copy_(0, on_device(self._places(), rows_R.device), rows_R)
        parts = in_order_R.split([count_rows(batch) for batch in self.batches])
        return [part[:, : self._widest(n)] if part.ndim > 2 else part for n, part in enumerate(parts)]

    def gradients(self, by_number: Mapping[int, Tensor]) -> list[Tensor]:
        """Return the gradient of every pass's output, from those of the batches' embeddings."""
        widest = self._widest()
        whole_R = torch.cat([_widened(by_number[number], widest) for number in self.numbers])
        rows_R = whole_R.index_select(0, on_device(self._places(), whole_R.device))
        parts = zip(rows_R.split([p.micro_batch.rows for p in self.passes]), self.passes, strict=True)
        return [
            (part[:, : _tokens(p.output)] if part.ndim > 2 else part) if len(part) else torch.zeros_like(p.output)
            for part, p in parts
        ]

    def _places(self) -> Tensor:
        """Return, for each row as the micro-batches hold them, its place among the rows of all batches."""
        starts = torch.tensor([0, *(count_rows(batch) for batch in self.batches)]).cumsum(0)
        pieces = [piece for p in self.passes for piece in p.micro_batch.pieces]
        return torch.cat([torch.empty(0, dtype=torch.int64), *(piece.rows_b + starts[piece.batch] for piece in pieces)])

    def _widest(self, batch: int | None = None) -> int:
        """Return the most tokens of an output; batch: among the micro-batches with rows of it, if there are any."""
        holding = [p for p in self.passes if any(piece.batch == batch for piece in p.micro_batch.pieces)]
        return max(_tokens(p.output) for p in holding or self.passes)


def in_order(groups: Sequence[Group]) -> list[Tensor]:
    """Return the embeddings of all batches, as the step was given them."""
    by_number = {n: e for group in groups for n, e in zip(group.numbers, group.embeddings(), strict=True)}
    return [by_number[number] for number in sorted(by_number)]


def _tokens(output: Tensor) -> int:
    return output.shape[1] if output.ndim > 2 else 0


def _widened(rows: Tensor, tokens: int) -> Tensor:
    missing = tokens - rows.shape[1] if rows.ndim > 2 else 0
    return pad(rows, (0, 0) * (rows.ndim - 2) + (0, missing)) if missing else rows


def check_callables(encode: object, loss: object) -> None:
    """Raise ValueError unless encode is a callable or a sequence of callables, and loss a callable."""
    if not callable(encode) and (not isinstance(encode, Sequence) or isinstance(encode, str)):
        raise ValueError(
            f"GradCache: encode must be a callable, or a sequence of one for each batch; got {type(encode).__name__}"
        )
    for place, entry in enumerate(() if callable(encode) else encode):
        if not callable(entry):
            raise ValueError(f"GradCache: encode must hold callables only, got {type(entry).__name__} at place {place}")
    if not callable(loss):
        raise ValueError(
            f"GradCache: loss must be a callable of the batches' embeddings, got {type(loss).__name__}; "
            "for example lambda q, p: info_nce(q, p, temperature=0.02)"
        )


def group_batches(encode: Encode | Sequence[Encode], batches: Sequence[Batch]) -> list[Group]:
    encodes = [encode] * len(batches) if callable(encode) else encode
    if len(encodes) != len(batches):
        raise ValueError(f"GradCache: {len(encodes)} encoders for {len(batches)} batches; give one for each")
    groups: list[Group] = []
    for number, (encode_batch, batch) in enumerate(zip(encodes, batches, strict=True)):
        constants = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
        # Bound methods are made anew at each access: equal, not identical.
        group = next((g for g in groups if g.encode == encode_batch and g.constants == constants), None)
        if group is None:
            group = Group(encode_batch, constants)
            groups.append(group)
        group.batches.append(batch)
        group.numbers.append(number)
    return groups
