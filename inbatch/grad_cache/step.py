"""The two-pass training step: a batch of any size in the memory of a micro-batch, with the plain step's gradient.

Shapes: B rows of one local batch, R rows of all batches that share an encoder, b rows of a micro-batch, D dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from inbatch.grad_cache.cut import MASK, Batch, MicroBatch, check_batches, cut, placeholder, take
from inbatch.grad_cache.memory import MIB, RandomState, free_bytes, graph_bytes, on_cuda, restored_random_state
from inbatch.grad_cache.reduce import is_ddp, is_fsdp2, local_gradients, reduce_gradients

Encode = Callable[[dict[str, Tensor]], Tensor]


@dataclass(kw_only=True)
class _Group:
    """The batches that share an encoder, and what the first pass left of each of their micro-batches."""

    encode: Encode
    batches: list[Batch]
    numbers: list[int]  # their places among the step's batches
    micro_batches: list[MicroBatch] = field(default_factory=list)
    kept: int = 0  # the first `kept` graphs are kept
    outputs: list[Tensor] = field(default_factory=list)  # with a graph where kept, else without
    states: list[RandomState] = field(default_factory=list)
    trainable: bool = False


class GradCache:
    """One training step on a batch of any size: the gradient of the plain step, in bounded memory.

        e = encode(batch) without graph;  g = d loss(e) / d e, once for the whole batch;  g . d encode(batch), in parts

    encode: dict of tensors -> [b, D] (any trailing shape); one callable for all batches, or a sequence with one per batch.
        Batches that share a callable share micro-batches. A micro-batch lies on the device of its batch.
    loss: (embeddings of batch 0, of batch 1, ...) -> 0-d tensor; called once a step. Other inputs come by closure; a
        parameter it uses (a temperature) gets its gradient there, once.
    modules: DDP or FSDP2 (`fully_shard`) roots that encode runs through; their gradients are reduced once a step. An
        encode that is such a module, or a method of one, is found by itself.
    micro_batch_tokens: most tokens, padding included, of one micro-batch. "auto" finds a size that fits, in the first
        step, from the longest rows; None keeps each batch whole, the plain step.
    keep_graph_mib: memory for graphs that need no second encoding; "auto" uses what is free, 0 keeps none.
    width_multiple: widths are rounded up to it, as far as the batch has columns: fewer shapes to compile or tune for.
    max_over_ranks: int -> the largest over all ranks. Needed under FSDP2, where every rank must encode equally often.
    Raises ValueError for batches, encodings or losses of the wrong shape, and where nothing is trainable.
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
    ):
        self._encode = encode
        self._loss = loss
        self._modules = _wrapped_modules(encode, modules)
        self._budget = _count("micro_batch_tokens", micro_batch_tokens, least=1, words=("auto", None))
        self._keep_mib = _count("keep_graph_mib", keep_graph_mib, least=0, words=("auto",))
        self._multiple = _count("width_multiple", width_multiple, least=1)
        if max_over_ranks is None and any(is_fsdp2(module) for module in self._modules):
            raise ValueError(
                "GradCache: FSDP2 gathers parameters in every pass, so all ranks must encode equally often; give "
                "max_over_ranks, a function from an int to its maximum over the ranks"
            )
        self._max = max_over_ranks or (lambda value: value)

    @property
    def micro_batch_tokens(self) -> int | None:
        """The token budget in use; the one found, once the first step has run under "auto"."""
        return None if self._budget == "auto" else self._budget  # type: ignore[return-value]

    def __call__(self, *batches: Batch, reduce: bool = True) -> Tensor:
        """Add the step's gradients to every `.grad` and return the detached loss.

        Random generators end where one pass over the micro-batches and one loss leave them, however many graphs were
        kept. reduce=False leaves gradients local, for accumulation: a later step with reduce=True reduces the sum.
        Accumulation adds no negatives: a query sees its own batch only.
        """
        check_batches(batches)
        groups = self._groups(batches)
        with local_gradients(self._modules):
            self._choose_budget(groups)
            held = 0
            for group in groups:
                held += self._first_pass(group, held)
            loss, gradients = self._loss_and_gradients(groups, batches)
            with restored_random_state():
                self._second_pass(groups, gradients)
        if reduce:
            reduce_gradients(self._modules)
        return loss

    def _groups(self, batches: Sequence[Batch]) -> list[_Group]:
        if callable(self._encode):
            return [_Group(encode=self._encode, batches=list(batches), numbers=list(range(len(batches))))]
        if len(self._encode) != len(batches):
            raise ValueError(f"GradCache: {len(self._encode)} encoders for {len(batches)} batches; give one for each")
        groups: list[_Group] = []
        for number, (encode, batch) in enumerate(zip(self._encode, batches, strict=True)):
            # Bound methods are made anew at each access: equal, not identical.
            group = next((group for group in groups if group.encode == encode), None)
            if group is None:
                group = _Group(encode=encode, batches=[], numbers=[])
                groups.append(group)
            group.batches.append(batch)
            group.numbers.append(number)
        return groups

    def _choose_budget(self, groups: Sequence[_Group]) -> None:
        """Under "auto", in the first step: run the longest rows forward and backward and set the budget by what it took."""
        if self._budget != "auto":
            return
        if not on_cuda():
            self._budget = _CPU_TOKENS
            return
        tokens, fits = _FIRST_TOKENS, 0
        while not fits:
            try:
                fits = min(self._probe(group, tokens) for group in groups)
            except torch.OutOfMemoryError as error:
                if tokens <= _LEAST_TOKENS or any(is_fsdp2(module) for module in self._modules):
                    raise torch.OutOfMemoryError(
                        f"GradCache: {tokens} tokens forward and backward do not fit; set micro_batch_tokens lower, or "
                        "use gradient checkpointing, shorter texts or sharded parameters"
                    ) from error
                tokens //= 2
            torch.cuda.empty_cache()
        self._budget = -self._max(-min(fits, tokens if tokens < _FIRST_TOKENS else fits))

    def _probe(self, group: _Group, tokens: int) -> int:
        """Tokens a micro-batch may have so that its peak takes at most an eighth of what is free."""
        micro_batch = cut(group.batches, budget=tokens, multiple=self._multiple)[0]
        free = free_bytes(self._modules)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with restored_random_state():
            output = group.encode(take(group.batches, micro_batch))
            if output.requires_grad:
                output.backward(torch.zeros_like(output))
        peak = max(1, torch.cuda.max_memory_allocated() - before)
        return min(_MOST_TOKENS, max(_LEAST_TOKENS, int(free / 8 / peak * micro_batch.tokens) // 1024 * 1024))

    def _first_pass(self, group: _Group, held: int) -> int:
        """Encode every micro-batch, the first ones with a graph, as many as the memory budget holds; the bytes they hold."""
        kept_bytes = 0
        parts = cut(group.batches, budget=self._budget, multiple=self._multiple)  # type: ignore[arg-type]
        parts += [placeholder(1)] * (self._max(len(parts)) - len(parts))
        group.micro_batches = parts
        for index, micro_batch in enumerate(parts):
            group.states.append(RandomState())
            inputs = take(group.batches, micro_batch)
            if index == 0:
                # Always with a graph: it tells whether the encoder trains and what a graph weighs.
                output, size = graph_bytes(lambda inputs=inputs: group.encode(inputs))
                group.trainable = isinstance(output, Tensor) and output.requires_grad
                if group.trainable:
                    group.kept, kept_bytes = self._graphs_that_fit(group, size, held)
            else:
                with torch.set_grad_enabled(index < group.kept):
                    output = group.encode(inputs)
            _check_output(output, micro_batch)
            group.outputs.append(output if index < group.kept else output.detach())
            if index + 1 == group.kept or (index == 0 and group.kept == 0):
                # Weights that autocast cast without a graph must not serve a pass that needs one, nor the reverse.
                torch.clear_autocast_cache()
        torch.clear_autocast_cache()
        return kept_bytes

    def _graphs_that_fit(self, group: _Group, size: int, held: int) -> tuple[int, int]:
        """How many micro-batches keep their graph, equal on all ranks, and the bytes that this takes."""
        if self._keep_mib == "auto":
            # The first graph is made already; the spare one is for a backward's temporaries and a graph made again.
            budget = free_bytes(self._modules) - size if on_cuda() else free_bytes(self._modules) - held
        else:
            budget = int(self._keep_mib) * MIB - held
        per_token = size / group.micro_batches[0].tokens
        taken = [per_token * tokens for tokens in accumulate(m.tokens for m in group.micro_batches)]
        fits = -self._max(-sum(total <= budget for total in taken))
        return fits, int(taken[fits - 1]) if fits else 0

    def _loss_and_gradients(self, groups: Sequence[_Group], batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor]]:
        """The detached loss, and for each group the gradient of its rows in the order the micro-batches hold them."""
        leaves: list[Tensor] = [torch.empty(0)] * len(batches)
        orders = []
        for group in groups:
            sizes = [len(batch[MASK]) for batch in group.batches]
            order_r = _row_order(group, sizes)
            rows_rd = torch.cat([o.detach()[: m.rows] for o, m in zip(group.outputs, group.micro_batches, strict=True)])
            order_r = order_r.to(rows_rd.device, non_blocking=True)
            orders.append(order_r)
            in_order_rd = torch.empty_like(rows_rd).index_copy_(0, order_r, rows_rd)
            for number, leaf in zip(group.numbers, in_order_rd.split(sizes), strict=True):
                leaves[number] = leaf.clone().requires_grad_(group.trainable)
        with torch.enable_grad():
            loss = self._loss(*leaves)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"GradCache: loss must return a 0-d tensor, got {shape}")
        if not loss.requires_grad:
            raise ValueError("GradCache: nothing to train: no encoder's output and no input of the loss requires grad")
        loss.backward()
        gradients = []
        for group, order_r in zip(groups, orders, strict=True):
            parts = [
                leaves[n].grad if leaves[n].grad is not None else torch.zeros_like(leaves[n]) for n in group.numbers
            ]
            gradients.append(torch.cat(parts).index_select(0, order_r))  # type: ignore[arg-type]
        return loss.detach(), gradients

    def _second_pass(self, groups: Sequence[_Group], gradients: Sequence[Tensor]) -> None:
        """Backward through the kept graphs, which frees them, then encode and backward the rest."""
        for group, gradient_rd in zip(groups, gradients, strict=True):
            for index in range(group.kept):
                _backward(group, index, group.outputs[index], gradient_rd)
                group.outputs[index] = group.outputs[index].detach()
        for group, gradient_rd in zip(groups, gradients, strict=True):
            for index in range(group.kept, len(group.micro_batches) if group.trainable else 0):
                group.states[index].restore()
                output = group.encode(take(group.batches, group.micro_batches[index]))
                _backward(group, index, output, gradient_rd)


# Enough to fill any accelerator; beyond it larger micro-batches gain nothing and leave fewer graphs to keep.
_MOST_TOKENS = 65536
_FIRST_TOKENS = 16384
_LEAST_TOKENS = 512
_CPU_TOKENS = 4096  # a CPU gains nothing from more: caches, not launches, bound it


def _wrapped_modules(encode: Encode | Sequence[Encode], modules: Sequence[nn.Module]) -> list[nn.Module]:
    encodes = [encode] if callable(encode) else list(encode)
    found = [getattr(one, "__self__", one) for one in encodes]
    chosen: list[nn.Module] = []
    for module in [*modules, *(one for one in found if is_ddp(one) or is_fsdp2(one))]:
        if not is_ddp(module) and not is_fsdp2(module):
            raise ValueError(
                f"GradCache: modules takes DistributedDataParallel or fully_shard roots, got {type(module).__name__}; "
                "a module of one process needs no entry"
            )
        if not any(module is other for other in chosen):
            chosen.append(module)
    return chosen


def _count(name: str, value, *, least: int, words: tuple = ()):
    if not (value in words or (isinstance(value, int) and not isinstance(value, bool) and value >= least)):
        choices = "".join(f", {word!r}" for word in words)
        raise ValueError(f"GradCache: {name} must be an integer of at least {least}{choices}, got {value!r}")
    return value


def _check_output(output: object, micro_batch: MicroBatch) -> None:
    rows = max(micro_batch.rows, 1)
    if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != rows:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"GradCache: encode must return one embedding a row, [{rows}, D]; got {got}")


def _row_order(group: _Group, sizes: Sequence[int]) -> Tensor:
    """For each row as the micro-batches hold them: its place among the rows of the group's batches, one after another."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pieces = [piece for micro_batch in group.micro_batches for piece in micro_batch.pieces]
    return torch.cat([torch.empty(0, dtype=torch.int64), *(piece.rows_b + starts[piece.batch] for piece in pieces)])


def _backward(group: _Group, index: int, output: Tensor, gradient_rd: Tensor) -> None:
    start = sum(micro_batch.rows for micro_batch in group.micro_batches[:index])
    micro_batch = group.micro_batches[index]
    gradient_bd = gradient_rd[start : start + micro_batch.rows]
    if not micro_batch.rows:
        gradient_bd = torch.zeros_like(output)
    output.backward(gradient_bd)
