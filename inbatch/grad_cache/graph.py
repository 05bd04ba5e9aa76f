"""Embeddings whose backward is a second pass: to autograd, an ordinary function of the parameters behind them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def leaves(output: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a backward pass from `output` reaches.

    ValueError if the graph holds a reentrant checkpoint, which loses gradients where its inputs need none.
    """
    if output.grad_fn is None:
        return [output]
    nodes, seen, reached = [output.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name == "CheckpointFunctionBackward":
            raise ValueError(
                "GradCache: encode uses reentrant gradient checkpointing, which loses gradients below frozen inputs "
                'and cannot run under FSDP2; use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if name == "torch::autograd::AccumulateGrad":
            reached.append(node.variable)  # type: ignore[attr-defined]
        nodes.extend(following for following, _ in node.next_functions if following is not None)
    return reached


class Sums:
    """Add up gradients of parameters beside `.grad`: hooks that wait for a parameter's gradient are not run."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, output: Tensor, gradient: Tensor) -> None:
        behind = leaves(output)
        gradients = torch.autograd.grad(output, behind, gradient, allow_unused=True)
        for leaf, grad in zip(behind, gradients, strict=True):
            if grad is None:
                continue
            if not isinstance(leaf, nn.Parameter):  # such as an activation made a leaf, which ends with its graph
                _add_to_grad(leaf, grad)
            elif id(leaf) in self._by_id:
                self._by_id[id(leaf)][1].add_(grad)
            else:
                self._by_id[id(leaf)] = leaf, grad.clone()  # other parameters may share it

    def take(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the sums of these parameters (None where nothing came); others' go to their `.grad`."""
        taken = [self._by_id.pop(id(parameter), (None, None))[1] for parameter in parameters]
        for leaf, grad in self._by_id.values():
            _add_to_grad(leaf, grad)
        return taken


def _add_to_grad(leaf: Tensor, grad: Tensor) -> None:
    leaf.grad = grad if leaf.grad is None else leaf.grad + grad


class _SecondPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, second_pass, count: int, *tensors: Tensor):
        ctx.second_pass, ctx.count = second_pass, count
        return tuple(embeddings.detach() for embeddings in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):  # type: ignore[override]
        with torch.enable_grad():
            return None, None, *[None] * ctx.count, *ctx.second_pass(gradients)


def deferred(
    embeddings: Sequence[Tensor],
    parameters: Sequence[Tensor],
    second_pass: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
) -> tuple[Tensor, ...]:
    """Return the same embeddings as functions of the parameters: their backward is `second_pass`.

    second_pass: gradients of the embeddings -> gradients of the parameters (None: zero); grad mode is on in it.
    """
    return _SecondPass.apply(second_pass, len(embeddings), *embeddings, *parameters)  # type: ignore[return-value]
