"""The two-pass training step: a batch of any size in the memory of a micro-batch, with the plain step's gradient.

Shapes: B rows of one local batch, R rows of all batches that share an encoder, b rows of a micro-batch, D dimension.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor, nn

from inbatch.grad_cache.cut import Batch, check_batches, cut, placeholder
from inbatch.grad_cache.group import (
    Encode,
    Group,
    backward,
    check_callables,
    group_batches,
    refuse_reentrant_checkpoints,
)
from inbatch.grad_cache.memory import (
    CPU_TOKENS,
    FIRST_TOKENS,
    LEAST_TOKENS,
    MIB,
    MOST_TOKENS,
    RandomState,
    free_bytes,
    graph_bytes,
    on_cuda,
    restored_random_state,
    shared_casts,
    to_device,
    tokens_that_fit,
)
from inbatch.grad_cache.reduce import is_fsdp2, local_gradients, others_refused, reduce_gradients, wrapped_modules


class GradCache:
    """One training step on a batch of any size: the gradient of the plain step, in bounded memory.

        e = encode(batch) in parts, without graph;  g = d loss(e) / d e, once;  g . d encode(batch), in parts

    encode: dict of tensors -> [b, D] (or any shape after b); one callable for all batches, or a sequence with one each.
        Batches that share a callable share micro-batches. A micro-batch lies on the device of its batch. With
        "attention_mask" [B, T], integer and bool tensors [B, T, ...] and a floating-point "inputs_embeds" [B, T, D]
        are of tokens: cut to the micro-batch's width. Other tensors, floating-point [B, T] too, have whole rows.
    loss: (embeddings of batch 0, of batch 1, ...) -> 0-d tensor; called once a step. Other inputs come by closure; a
        parameter it uses (a temperature) gets its gradient there, once.
    modules: DDP or FSDP2 (`fully_shard`) roots that encode runs through; their gradients are reduced once a step. An
        encode that is such a module, or a method of one, is found by itself; inside any other it must be given.
    micro_batch_tokens: most tokens, padding included, of one micro-batch. "auto" finds a size that fits, in the first
        step, from the longest rows; None keeps each batch whole, the plain step.
    keep_graph_mib: memory for graphs that need no second encoding; "auto" is what is free, 0 keeps none.
    width_multiple: widths are rounded up to it, as far as the batch has columns: fewer shapes to compile or tune for.
    max_over_ranks: int -> the largest over all ranks. Needed under FSDP2, where every rank must encode equally often.
    reshard: under FSDP2, False keeps gathered parameters until the step's end: faster, for the memory of the model.
    Raises ValueError for batches, encodings or losses of the wrong shape, where nothing is trainable, and, in the
        first step, for a DDP or FSDP2 module that encode calls and `modules` lacks.
    Source: Gao et al. 2021 (arXiv:2101.06983); here with length-sorted micro-batches, kept graphs, one reduction.
    """

    def __init__(
        self,
        encode: Encode | Sequence[Encode],
        loss: Callable[..., Tensor],
        *,
        modules: Sequence[nn.Module] = (),
        micro_batch_tokens: int | str | None = "auto",
        keep_graph_mib: int | str = "auto",
        width_multiple: int = 8,
        max_over_ranks: Callable[[int], int] | None = None,
        reshard: bool = True,
    ):
        check_callables(encode, loss)
        self._encode = encode
        self._loss = loss
        self._modules = wrapped_modules([encode] if callable(encode) else encode, modules)
        self._budget = _count("micro_batch_tokens", micro_batch_tokens, least=1, words=("auto", None))
        self._keep_mib = _count("keep_graph_mib", keep_graph_mib, least=0, words=("auto",))
        self._multiple = _count("width_multiple", width_multiple, least=1)
        self._sharded = any(is_fsdp2(module) for module in self._modules)
        if max_over_ranks is None and self._sharded:
            raise ValueError(
                "GradCache: FSDP2 gathers parameters in every pass, so all ranks must encode equally often; give "
                "max_over_ranks, a function from an int to its maximum over the ranks"
            )
        self._max = max_over_ranks or (lambda value: value)
        self._reshard = reshard
        self._keep_share = 1.0
        self._checked = False

    @property
    def micro_batch_tokens(self) -> int | str | None:
        """The token budget in use: what was given, or what "auto" found in the first step."""
        return self._budget

    def __call__(self, *batches: Batch, reduce: bool = True) -> Tensor:
        """Add the step's gradients to every `.grad` and return the detached loss.

        Random generators end where one pass over the micro-batches and one loss leave them, however many graphs were
        kept. reduce=False leaves gradients local, for accumulation: a later step with reduce=True reduces the sum.
        Accumulation adds no negatives: a query sees its own batch only.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("GradCache: nothing can be trained under torch.inference_mode(); call the step outside it")
        check_batches(batches)
        groups = group_batches(self._encode, batches)
        with local_gradients(self._modules, reshard=self._reshard), torch.enable_grad():
            if self._budget == "auto":
                with self._check():
                    self._budget = self._find_budget(groups)
            # Under FSDP2 a cast would outlive the gathered weight it was made of.
            with nullcontext() if self._sharded else shared_casts():
                held = 0
                with self._check():
                    for group in groups:
                        held += self._first_pass(group, held)
                self._checked = True
                loss, gradients = self._loss_and_gradients(groups, len(batches))
                with restored_random_state():
                    self._second_pass(groups, gradients)
        if reduce:
            reduce_gradients(self._modules)
        return loss

    def _check(self) -> AbstractContextManager[None]:
        """Around what encodes for the first time. Not around the loss: its modules reduce their own gradients."""
        return nullcontext() if self._checked else others_refused(self._modules)

    def _find_budget(self, groups: Sequence[Group]) -> int:
        """The token budget by what the longest rows take forward and backward; fewer until they fit."""
        if not on_cuda():
            return CPU_TOKENS
        tokens, most = FIRST_TOKENS, MOST_TOKENS
        while True:
            try:
                fits = min(self._probe(group, tokens) for group in groups)
                return -self._max(-min(fits, most))
            except torch.OutOfMemoryError as error:
                # Under FSDP2 the other ranks are inside a collective by now.
                if tokens <= LEAST_TOKENS or self._sharded:
                    raise torch.OutOfMemoryError(
                        f"GradCache: {tokens} tokens forward and backward do not fit; set micro_batch_tokens lower, or "
                        "use gradient checkpointing, shorter texts or sharded parameters"
                    ) from error
            tokens = most = tokens // 2
            torch.cuda.empty_cache()

    def _probe(self, group: Group, tokens: int) -> int:
        group.micro_batches = cut(group.batches, budget=tokens, multiple=self._multiple)[:1]

        def forward_and_backward() -> None:
            output = group.encoded(0)
            if output.requires_grad:
                output.backward(torch.zeros_like(output))

        with restored_random_state():
            return tokens_that_fit(forward_and_backward, group.micro_batches[0].tokens, free_bytes(self._modules))

    def _first_pass(self, group: Group, held: int) -> int:
        """Encode all micro-batches, the first ones with a graph, as many as fit; the bytes that those hold."""
        group.micro_batches = cut(group.batches, budget=self._budget, multiple=self._multiple)  # type: ignore[arg-type]
        missing = self._max(len(group.micro_batches)) - len(group.micro_batches)
        group.micro_batches += [placeholder(1)] * missing
        group.states.append(RandomState())
        # The first always with a graph: it tells whether the encoder trains, and what a graph weighs.
        output, size = graph_bytes(lambda: group.encoded(0))
        group.trainable, kept_bytes = output.requires_grad, 0
        if group.trainable:
            if not self._checked:
                refuse_reentrant_checkpoints(output)
            group.kept, kept_bytes = self._graphs_that_fit(group, size, held)
        group.outputs.append(output if group.kept else output.detach())
        del output
        for index in range(1, len(group.micro_batches)):
            if index == max(1, group.kept):
                # A weight that autocast cast in one grad mode must not serve the other.
                torch.clear_autocast_cache()
            group.states.append(RandomState())
            group.outputs.append(self._encode_once(group, index))
        torch.clear_autocast_cache()
        return kept_bytes

    def _encode_once(self, group: Group, index: int) -> Tensor:
        if index < group.kept:
            try:
                return group.encoded(index)
            except torch.OutOfMemoryError:
                if self._sharded:
                    raise
            # The estimate was too high: this graph is not kept after all, nor that many in later steps.
            group.kept = index
            self._keep_share *= 0.8
            torch.clear_autocast_cache()
            group.states[index].restore()
            if on_cuda():
                torch.cuda.empty_cache()
        with torch.no_grad():
            return group.encoded(index)

    def _graphs_that_fit(self, group: Group, size: int, held: int) -> tuple[int, int]:
        """How many micro-batches keep their graph, equal on all ranks, and the bytes that this takes."""
        if self._keep_mib == "auto":
            # The first graph is made already; the spare one is for a backward's temporaries and a graph made again.
            budget = (free_bytes(self._modules) - (size if on_cuda() else held)) * self._keep_share
        else:
            budget = int(self._keep_mib) * MIB * self._keep_share - held
        per_token = size / group.micro_batches[0].tokens
        taken = [per_token * tokens for tokens in accumulate(one.tokens for one in group.micro_batches)]
        fits = -self._max(-sum(total <= budget for total in taken))
        return fits, int(taken[fits - 1]) if fits else 0

    def _loss_and_gradients(self, groups: Sequence[Group], count: int) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The detached loss, and for each group the gradients of its micro-batches' rows."""
        leaves: list[Tensor] = [torch.empty(0)] * count
        orders = []
        for group in groups:
            rows_RD = group.rows()
            orders.append(to_device(group.row_order(), rows_RD.device))
            in_order_RD = torch.empty_like(rows_RD).index_copy_(0, orders[-1], rows_RD)
            for number, leaf_BD in zip(group.numbers, in_order_RD.split(group.sizes), strict=True):
                leaves[number] = leaf_BD.clone().requires_grad_(group.trainable)
        loss = self._loss(*leaves)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"GradCache: loss must return a 0-d tensor, got {got}")
        if not loss.requires_grad:
            raise ValueError("GradCache: nothing to train: no encoder's output and no input of the loss requires grad")
        loss.backward()
        gradients = []
        for group, order_R in zip(groups, orders, strict=True):
            own = [leaves[number] for number in group.numbers]
            parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in own]
            gradients.append(group.split(torch.cat(parts).index_select(0, order_R)))
        return loss.detach(), gradients

    def _second_pass(self, groups: Sequence[Group], gradients: Sequence[tuple[Tensor, ...]]) -> None:
        """Backward through the kept graphs, which frees them, then encode the rest again, each with its backward."""
        for group, gradient_bD in zip(groups, gradients, strict=True):
            for index in range(group.kept):
                backward(group.outputs[index], gradient_bD[index])
                group.outputs[index] = group.outputs[index].detach()
        for group, gradient_bD in zip(groups, gradients, strict=True):
            for index in range(group.kept, len(group.micro_batches) if group.trainable else 0):
                group.states[index].restore()
                backward(group.encoded(index), gradient_bD[index])


def _count(name: str, value, *, least: int, words: tuple = ()):
    if not (value in words or (isinstance(value, int) and not isinstance(value, bool) and value >= least)):
        choices = "".join(f", or {word!r}" for word in words)
        raise ValueError(f"GradCache: {name} must be an integer of at least {least}{choices}; got {value!r}")
    return value
