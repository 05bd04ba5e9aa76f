"""The batches that share an encoder, and one pass over a micro-batch of theirs.

Shapes: B rows of one batch, R rows of the group's batches, b rows of a micro-batch, D dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inbatch.grad_cache.cut import MASK, Batch, MicroBatch, take
from inbatch.grad_cache.memory import RandomState

Encode = Callable[[dict[str, Tensor]], Tensor]


@dataclass(kw_only=True)
class Group:
    """One encoder's batches and micro-batches, and what the first pass leaves for the second."""

    encode: Encode
    batches: list[Batch] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # the batches' places among the step's
    micro_batches: list[MicroBatch] = field(default_factory=list)
    kept: int = 0  # the first `kept` micro-batches keep their graph
    outputs: list[Tensor] = field(default_factory=list)  # with a graph where kept, else without
    states: list[RandomState] = field(default_factory=list)
    trainable: bool = False

    @property
    def sizes(self) -> list[int]:
        return [len(batch[MASK]) for batch in self.batches]

    def encoded(self, index: int) -> Tensor:
        """Encode a micro-batch, with a graph where grad mode is on; ValueError for an output that does not fit."""
        micro_batch = self.micro_batches[index]
        output = self.encode(take(self.batches, micro_batch))
        rows = max(micro_batch.rows, 1)
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != rows:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"GradCache: encode must return one embedding a row, [{rows}, D]; got {got}")
        if self.outputs and output.shape[1:] != self.outputs[0].shape[1:]:
            shapes = f"{tuple(self.outputs[0].shape)} and {tuple(output.shape)}"
            raise ValueError(f"GradCache: encode must return equally shaped embeddings for all rows; got {shapes}")
        return output

    def row_order(self) -> Tensor:
        """For each row as the micro-batches hold them: its place among the rows of the batches, one after another."""
        starts = [sum(self.sizes[:number]) for number in range(len(self.batches))]
        pieces = [piece for micro_batch in self.micro_batches for piece in micro_batch.pieces]
        return torch.cat([torch.empty(0, dtype=torch.int64), *(piece.rows_b + starts[piece.batch] for piece in pieces)])

    def rows(self) -> Tensor:
        """[R, D] without a graph, in the order the micro-batches hold them."""
        pairs = zip(self.outputs, self.micro_batches, strict=True)
        return torch.cat([output.detach()[: micro_batch.rows] for output, micro_batch in pairs])

    def split(self, rows_RD: Tensor) -> tuple[Tensor, ...]:
        """By micro-batch, from rows in the order those hold them; a placeholder has none."""
        return rows_RD.split([micro_batch.rows for micro_batch in self.micro_batches])


def backward(output: Tensor, gradient_bD: Tensor) -> None:
    """From a micro-batch's output; with zeros from a placeholder's."""
    output.backward(gradient_bD if len(gradient_bD) else torch.zeros_like(output))


def check_callables(encode: object, loss: object) -> None:
    """ValueError unless encode is a callable or a sequence of callables, and loss a callable."""
    if not callable(encode) and (not isinstance(encode, Sequence) or isinstance(encode, str)):
        raise ValueError(
            f"GradCache: encode must be a callable, or a sequence of one for each batch; got {type(encode).__name__}"
        )
    for number, one in enumerate(() if callable(encode) else encode):
        if not callable(one):
            raise ValueError(f"GradCache: encode must hold callables only, got {type(one).__name__} at place {number}")
    if not callable(loss):
        raise ValueError(
            f"GradCache: loss must be a callable of the batches' embeddings, got {type(loss).__name__}; "
            "for example lambda q, p: info_nce(q, p, temperature=0.02)"
        )


def group_batches(encode: Encode | Sequence[Encode], batches: Sequence[Batch]) -> list[Group]:
    if callable(encode):
        return [Group(encode=encode, batches=list(batches), numbers=list(range(len(batches))))]
    if len(encode) != len(batches):
        raise ValueError(f"GradCache: {len(encode)} encoders for {len(batches)} batches; give one for each")
    groups: list[Group] = []
    for number, (one, batch) in enumerate(zip(encode, batches, strict=True)):
        # Bound methods are made anew at each access: equal, not identical.
        group = next((group for group in groups if group.encode == one), None)
        if group is None:
            group = Group(encode=one)
            groups.append(group)
        group.batches.append(batch)
        group.numbers.append(number)
    return groups


def refuse_reentrant_checkpoints(output: Tensor) -> None:
    """ValueError if the graph holds a reentrant checkpoint, which loses gradients where its inputs need none."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "GradCache: encode uses reentrant gradient checkpointing, which loses gradients below frozen inputs "
                'and cannot run under FSDP2; use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        seen.add(node)
        nodes.extend(next_node for next_node, _ in node.next_functions)
