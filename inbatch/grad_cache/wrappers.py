"""One gradient reduction a step through DDP and FSDP2 modules, by their own means, for any number of passes.

Every pass runs with the module's own synchronisation off. The reduction is started by a backward pass that reaches
every parameter and adds nothing: so it does not matter which parameters the last micro-batch used, in which order
graphs were freed, or whether this rank had rows at all. Where there is one DDP module, that pass is also the last
micro-batch's backward.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size, is_initialized

_FSDP1 = (
    "GradCache: {} is FullyShardedDataParallel (FSDP1), which is not supported: it communicates in every pass, and "
    "ranks encode unequally often; shard with torch.distributed.fsdp.fully_shard (FSDP2), and give max_over_ranks"
)


def is_ddp(module: object) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)


def is_fsdp2(module: object) -> bool:
    # Named by what it offers: FSDPModule is a mixin that fully_shard adds to the module's own class.
    return isinstance(module, nn.Module) and hasattr(module, "set_requires_gradient_sync")


def is_fsdp1(module: object) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nobody has sharded anything
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def wrapped_modules(encodes: Sequence[object], modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the DDP and FSDP2 roots given and those that an encode is or is a method of; ValueError for others."""
    if isinstance(modules, nn.Module) or not isinstance(modules, Iterable):
        raise ValueError(
            f"GradCache: modules must be a sequence of DistributedDataParallel or fully_shard roots, got "
            f"{type(modules).__name__}; write modules=[module], or leave it out for a module of one process"
        )
    owners = [getattr(encode, "__self__", encode) for encode in encodes]
    for module in [*modules, *owners]:
        if isinstance(module, nn.Module) and any(map(is_fsdp1, module.modules())):
            raise ValueError(_FSDP1.format(type(module).__name__ if not is_fsdp1(module) else "the module given"))
    if any(is_ddp(inner) or is_fsdp2(inner) for inner in (getattr(owner, "_orig_mod", None) for owner in owners)):
        raise ValueError(
            "GradCache: torch.compile around DistributedDataParallel or fully_shard compiles their synchronisation; "
            "compile the module inside, or its layers, and give the wrapper"
        )
    both: list[Any] = [*modules, *(owner for owner in owners if is_ddp(owner) or is_fsdp2(owner))]
    chosen = list({id(module): module for module in both}.values())
    for module in chosen:
        if not is_ddp(module) and not is_fsdp2(module):
            raise ValueError(
                f"GradCache: modules takes DistributedDataParallel or fully_shard roots, got {type(module).__name__}; "
                "a module of one process needs no entry"
            )
        for option in ("static_graph", "mixed_precision"):
            if is_ddp(module) and getattr(module, option, None):
                raise ValueError(
                    f"GradCache: DistributedDataParallel(..., {option}=...) is not supported: neither that nor "
                    "find_unused_parameters is needed here, and autocast does what mixed_precision does"
                )
    return chosen


def running_ddp() -> list[nn.Module]:
    """Return the DDP module whose forward is calling us, as trainers' do that wrap the loss with the model."""
    module = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return [] if module is None else [module]


# ---- what the first step checks


@contextmanager
def others_refused(modules: Sequence[nn.Module]) -> Iterator[set[int]]:
    """Refuse calls of DDP, FSDP2 and FSDP1 modules that are neither in `modules` nor inside one, by ValueError.

    It is raised before the module's forward, which may start a collective that other ranks do not reach. Yields
    the ids of the parameters that `modules` reduce; those that FSDP2 gathers are added when they are used.
    """
    known = {id(inner) for module in modules for inner in module.modules()}
    reduced = {id(parameter) for module in modules for parameter in module.parameters()}
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = _with_subclasses(nn.parallel.DistributedDataParallel)
    if fsdp:
        kinds |= _with_subclasses(fsdp.FSDPModule) | _with_subclasses(fsdp.FullyShardedDataParallel)

    def note(module: nn.Module, _) -> None:
        reduced.update(map(id, module.parameters()))

    with ExitStack() as stack:
        # A hook on each living wrapper, wherever encode hides it. A global hook would be traced into every layer that
        # is compiled meanwhile. By type, not isinstance: proxies would answer for what they stand for.
        # A wrapper without attributes is being destroyed.
        for module in (thing for thing in gc.get_objects() if type(thing) in kinds and vars(thing)):
            if id(module) not in known:
                stack.callback(module.register_forward_pre_hook(_refuse, prepend=True).remove)
            elif is_fsdp2(module):
                stack.callback(module.register_forward_pre_hook(note).remove)  # after FSDP2's own, which gathers
        yield reduced


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


def _refuse(module: nn.Module, _) -> None:
    if is_fsdp1(module):
        raise ValueError(_FSDP1.format("a module that encode runs through"))
    name = type(module).__name__ + (f"({type(module.module).__name__})" if is_ddp(module) else "")
    raise ValueError(
        f"GradCache: encode runs through {name}, which is not in modules, so it would reduce gradients in each "
        "backward and not once a step; give modules=[...] with every DistributedDataParallel or fully_shard root that "
        "encode calls"
    )


def unreduced(leaves: Iterable[Tensor], reduced: set[int]) -> str | None:
    """Return a message if several processes train parameters whose gradients no module reduces, else None."""
    if not is_initialized() or get_world_size() == 1:
        return None
    trained = (leaf for leaf in leaves if isinstance(leaf, nn.Parameter))
    left = [tuple(parameter.shape) for parameter in trained if id(parameter) not in reduced]
    if not left:
        return None
    return (
        f"GradCache: {get_world_size()} processes train {len(left)} parameters (the first of shape {left[0]}) that no "
        "known DistributedDataParallel or fully_shard module holds, so each process would train a model of its own: "
        "give modules=[ddp] with the wrapper, or reduce=False in each call if you average the gradients yourself"
    )


# ---- passes without a reduction, and the reduction


@contextmanager
def local_gradients(modules: Sequence[nn.Module], *, reshard: bool) -> Iterator[None]:
    """Let forward and backward passes of the modules inside add to local gradients and start no reduction."""
    with ExitStack() as stack:
        for module in modules:
            if is_ddp(module):
                # DDP's forward is bypassed: even under no_sync it broadcasts buffers, and makes torch.compile split
                # layers at DDP's buckets for an overlap that these passes do not have.
                stack.enter_context(_forward_replaced(module, module.module.__call__))  # type: ignore[operator]
            else:
                _set_fsdp2(module, reduces=False, reshard=reshard)
                stack.callback(_set_fsdp2, module, reduces=True, reshard=True)
                if not reshard:
                    module.set_reshard_after_forward(False)  # type: ignore[operator]
        yield


def _set_fsdp2(module, *, reduces: bool, reshard: bool) -> None:
    module.set_requires_gradient_sync(reduces)
    module.set_is_last_backward(reduces)
    module.set_reshard_after_backward(reshard)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    before = vars(module).get("forward")  # accelerate, say, puts one there
    module.forward = forward  # shadows the class's method; the module's hooks still run
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Touch(torch.autograd.Function):
    """Return a zero that depends on every tensor given and passes no gradient: their accumulation hooks still run."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        return (None,) * ctx.count


class _Anchor(nn.Module):
    """Stand in for the wrapped module while DDP prepares to await gradients, which broadcasts the module's buffers."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, _: Tensor) -> Tensor:
        return _Touch.apply(*(p for p in self.wrapped.parameters() if p.requires_grad))  # type: ignore[return-value]


def await_gradients(module: nn.Module) -> Tensor:
    """Let a DDP module reduce the gradients that its parameters get next, each once.

    Returns a tensor whose backward adds nothing to any gradient, so that DDP reduces what `.grad` holds.
    """
    wrapped: nn.Module = module.module  # type: ignore[assignment]
    module.module = _Anchor(wrapped)  # type: ignore[arg-type]
    try:
        # It broadcasts buffers, position ids say, which would be an error to other losses whose graphs hold them.
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(wrapped.buffers())):
            # DDP with device_ids moves its inputs there, and wants one to move. `local_gradients` replaces `forward`.
            return nn.parallel.DistributedDataParallel.forward(module, torch.empty(0))  # type: ignore[arg-type]
    finally:
        module.module = wrapped


def accumulate_and_reduce(module: nn.Module, output: Tensor, gradient: Tensor) -> None:
    """Go backward from the last micro-batch's output while a DDP module reduces, each bucket as it is complete.

    One backward from both reaches every parameter once: those that this micro-batch does not use, too.
    """
    torch.autograd.backward([output, await_gradients(module)], [gradient, None])


def reduce_gradients(modules: Sequence[nn.Module]) -> None:
    """Let each module reduce, exactly once, the gradients that its parameters have added up."""
    for module in modules:
        if is_ddp(module):
            await_gradients(module).backward()
        else:
            zero = torch.zeros((), device=next(module.parameters()).device, requires_grad=True)
            # The root's own hooks queue the reduction of every group below it; its real forward is not needed for that.
            with _forward_replaced(module, lambda zero: zero * 1.0):
                anchor = module(zero)
            anchor.backward()
