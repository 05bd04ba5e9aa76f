"""The two-pass training step: a batch of any size in the memory of a micro-batch, with the plain step's gradient."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inbatch.collectives import agreeing_on
from inbatch.grad_cache.graph import Sums, deferred
from inbatch.grad_cache.group import Encode, Group, check_callables, group_batches, in_order
from inbatch.grad_cache.memory import missing_bytes, restored_random_state, shared_casts
from inbatch.grad_cache.micro_batches import Batch, check_batches
from inbatch.grad_cache.passes import Passes, second_pass
from inbatch.grad_cache.wrappers import (
    accumulate_and_reduce,
    await_gradients,
    is_ddp,
    is_fsdp2,
    local_gradients,
    others_refused,
    reduce_gradients,
    running_ddp,
    unreduced,
    wrapped_modules,
)
from inbatch.other_names import explains_other_names


class GradCache:
    """One training step on a batch of any size: the gradient of the plain step, in bounded memory.

        e = encode(batch) in parts, without graph;  g = d loss(e) / d e, once;  g . d encode(batch), in parts

    `loss = step(queries, passages)` leaves gradients in `.grad`. `step.loss(queries, passages)` has a backward that
    does the same, for trainers that call backward themselves.

    encode: batch -> [b, D], or [b, T, D] with any T; one callable for all batches, or a sequence with one each. Batches
        that share a callable share micro-batches. A batch maps names to tensors of B rows, and to numbers and strings,
        which encode gets as they are. With "attention_mask" [B, T], integer and bool tensors [B, T, ...] and a
        floating-point "inputs_embeds" [B, T, D] are of tokens: cut to the micro-batch's width. Other tensors are not.
    loss: (embeddings of batch 0, of batch 1, ..., **loss_kwargs) -> 0-d tensor; called once a step. In [B, T, D], T is
        the widest micro-batch's, filled up with vectors of zeros. Its own parameters get their gradient there, once.
    modules: DDP or FSDP2 (`fully_shard`) roots that hold what encode trains; their gradients are reduced once a step.
        Need not be named: an encode that is such a module or its method, and a DDP module whose forward calls the step.
    micro_batch_tokens: most tokens, padding included, of one micro-batch. "auto" is the smallest that fills the
        GPU, found in the first step by timing the longest rows; None keeps each batch whole, the plain step.
    packed: encode spends nothing on padding, as `BiEncoderModel.packed` says: real tokens are counted, and memory is
        estimated by them.
    keep_graph_mib: memory for graphs that need no second encoding; "auto" is what is free, 0 keeps none.
    width_multiple: widths are rounded up to it, as far as the batch has columns: fewer shapes to compile or tune for.
    max_over_ranks: int -> the largest over all ranks. Needed under FSDP2, where every rank must encode equally often.
    around: makes a context for the passes of a step, forward and backward, such as
        `lambda: bf16_copies(model)`.
    reshard: under FSDP2, False keeps gathered parameters until the step's end: faster, for the memory of the model.
    Source: Gao et al. 2021 (arXiv:2101.06983); here with length-sorted micro-batches, kept graphs, one reduction.
    """

    @explains_other_names
    def __init__(
        self,
        encode: Encode | Sequence[Encode],
        loss: Callable[..., Tensor],
        *,
        modules: Sequence[nn.Module] = (),
        micro_batch_tokens: int | str | None = "auto",
        keep_graph_mib: int | str = "auto",
        width_multiple: int = 8,
        packed: bool = False,
        max_over_ranks: Callable[[int], int] | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        reshard: bool = True,
    ):
        check_callables(encode, loss)
        self._encode = encode
        self._loss = loss
        self._modules = wrapped_modules([encode] if callable(encode) else encode, modules)
        self._sharded = any(is_fsdp2(module) for module in self._modules)
        if max_over_ranks is None and self._sharded:
            raise ValueError(
                "GradCache: FSDP2 gathers parameters in every pass, so all ranks must encode equally often; give "
                "max_over_ranks, a function from an int to its maximum over the ranks"
            )
        self._around, self._reshard = around, reshard
        self._passes = Passes(
            budget=_count("micro_batch_tokens", micro_batch_tokens, least=1, words=("auto", None)),
            keep_mib=_count("keep_graph_mib", keep_graph_mib, least=0, words=("auto",)),
            multiple=_count("width_multiple", width_multiple, least=1),
            packed=packed,
            max_over_ranks=max_over_ranks or (lambda value: value),
            sharded=self._sharded,
        )
        self._checked = False
        self._unreduced: str | None = None
        self._unfinished = 0  # steps, whose error somebody caught

    @property
    def micro_batch_tokens(self) -> int | str | None:
        """Return the token budget in use: what was given, or what "auto" found in the first step."""
        return self._passes.budget

    def __call__(self, *batches: Batch, loss_kwargs: Mapping[str, Any] | None = None, reduce: bool = True) -> Tensor:
        """Add the step's gradients to every `.grad` and return the detached loss; under no_grad, only the loss.

        Random generators end where one pass over the micro-batches and one loss leave them, however many graphs were
        kept. reduce=False leaves gradients local: for accumulation, where a later step reduces the sum, or for those
        who average them themselves. Accumulation adds no negatives: a query sees its own batch only.

        Raises ValueError for batches, encodings or losses of the wrong shape and where nothing is trainable; in the
        first step also for a DDP or FSDP module that encode hides, and for parameters that several processes train
        and no module reduces.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("GradCache: nothing can be trained under torch.inference_mode(); call the step outside it")
        if not torch.is_grad_enabled():
            return self.loss(*batches, loss_kwargs=loss_kwargs)
        modules = self._reducing_modules()
        with ExitStack() as around:
            groups = self._first_pass(batches, modules, reduce, around)
            embeddings = in_order(groups)
            for group in groups:
                for number in group.numbers:
                    embeddings[number].requires_grad_(group.trains)
            loss = self._loss_of(embeddings, loss_kwargs, reduce)
            if not loss.requires_grad:
                raise ValueError(
                    "GradCache: nothing to train: no encoder's output and no input of the loss requires grad"
                )
            loss.backward()
            gradients = {n: torch.zeros_like(e) if e.grad is None else e.grad for n, e in enumerate(embeddings)}
            # Several modules would reduce in an order that depends on whose micro-batch is a rank's last.
            overlaps = reduce and len(modules) == 1 and is_ddp(modules[0])
            with self._encoding(modules), restored_random_state():
                last = partial(accumulate_and_reduce, modules[0]) if overlaps else None
                reduced = second_pass(groups, gradients, Tensor.backward, last) and overlaps
        if reduce and not reduced:
            reduce_gradients(modules)
        return loss.detach()

    def loss(self, *batches: Batch, loss_kwargs: Mapping[str, Any] | None = None, reduce: bool = True) -> Tensor:
        """Return the loss, 0-d; its backward encodes a second time and gives every parameter its gradient.

        To autograd it is an ordinary function of the parameters: it may be scaled, added to other losses and trained
        by any trainer; DDP reduces what that gives, `no_sync` included. The price is memory, once or twice that of the
        gradients. (Under FSDP2 gradients go to `.grad` directly and are reduced in each backward.)
        Arguments and errors are those of the call.
        """
        modules = self._reducing_modules()
        with ExitStack() as around:
            groups = self._first_pass(batches, modules, reduce, around, look=True)
        embeddings = in_order(groups)
        trained = [number for group in groups if group.trains for number in group.numbers]
        if not trained:
            return self._loss_of(embeddings, loss_kwargs, reduce)
        ddps = [module for module in modules if is_ddp(module)]
        awaiting = [module for module in ddps if reduce and module.require_backward_grad_sync]
        parameters = [torch.zeros((), requires_grad=True)]
        if not self._sharded:  # FSDP2 acts when a parameter that it gathered accumulates its gradient
            held = [p for module in ddps for p in module.parameters() if p.requires_grad]  # DDP awaits all of them
            reached = [leaf for group in groups for leaf in group.leaves if isinstance(leaf, nn.Parameter)]
            parameters += {id(parameter): parameter for parameter in [*held, *reached]}.values()

        def backward(gradients: Sequence[Tensor]) -> list[Tensor | None]:
            sums = Sums()
            with self._around(), self._encoding(modules), restored_random_state():
                by_number = dict(zip(trained, gradients, strict=True))
                second_pass(groups, by_number, Tensor.backward if self._sharded else sums.add)
            if self._sharded and reduce:
                reduce_gradients(modules)
            for module in awaiting:
                await_gradients(module)
            return sums.take(parameters)

        functions = deferred([embeddings[number] for number in trained], parameters, backward)
        for number, embedding in zip(trained, functions, strict=True):
            embeddings[number] = embedding
        return self._loss_of(embeddings, loss_kwargs, reduce)

    def _reducing_modules(self) -> list[nn.Module]:
        return [*dict.fromkeys([*self._modules, *wrapped_modules([], running_ddp())])]

    @contextmanager
    def _encoding(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Prepare the modules for passes inside, forward and backward, that reduce nothing."""
        with local_gradients(modules, reshard=self._reshard), ExitStack() as stack:
            if not self._sharded:  # FSDP2 frees the gathered weight that a cast was made of
                stack.enter_context(shared_casts())
            yield

    def _first_pass(
        self,
        batches: Sequence[Batch],
        modules: Sequence[nn.Module],
        reduce: bool,
        around: ExitStack,
        *,
        look: bool = False,
    ) -> list[Group]:
        """Encode all batches; the context of the step's passes is entered in `around`."""
        self._unfinished += 1
        check_batches(batches)
        if reduce and self._unreduced and torch.is_grad_enabled():
            raise ValueError(self._unreduced)
        groups = group_batches(self._encode, batches)
        reserved = missing_bytes(modules, first=not self._checked)
        with ExitStack() as stack:
            # Both look at the parameters, in whose place `around` may put something else.
            reduced = set() if self._checked else stack.enter_context(others_refused(modules))
            stack.enter_context(self._encoding(modules))
            around.enter_context(self._around())
            self._passes.first(groups, reserved, look=look or not self._checked)
        if torch.is_grad_enabled() and not self._checked:
            self._unreduced = unreduced((leaf for group in groups for leaf in group.leaves), reduced)
            if reduce and self._unreduced:
                raise ValueError(self._unreduced)
            self._checked = True
        return groups

    def _loss_of(self, embeddings: Sequence[Tensor], loss_kwargs: Mapping[str, Any] | None, reduce: bool) -> Tensor:
        # Ranks that differ in these would wait for one another in the reduction, or train on different steps.
        same = {"GradCache's reduce": reduce, "GradCache's failed steps": self._unfinished - 1}
        with agreeing_on(**same):
            loss = self._loss(*embeddings, **(loss_kwargs or {}))
        self._unfinished -= 1
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"GradCache: loss must return a 0-d tensor, got {got}")
        return loss


def _count(name: str, value, *, least: int, words: tuple = ()):
    if not (value in words or (isinstance(value, int) and not isinstance(value, bool) and value >= least)):
        choices = "".join(f", or {word!r}" for word in words)
        raise ValueError(f"GradCache: {name} must be an integer of at least {least}{choices}; got {value!r}")
    return value
