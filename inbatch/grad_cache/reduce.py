"""One gradient reduction a step, for any number of forward and backward passes through DDP and FSDP2 modules.

Every pass runs with the module's own synchronisation off. The reduction is then started by one backward of its own,
which reaches every parameter and adds nothing: so it does not matter which parameters the last micro-batch used, in
which order graphs were freed, or whether this rank had rows at all.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


def is_ddp(module: object) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)


def is_fsdp2(module: object) -> bool:
    # Named by what it offers: FSDPModule is a mixin that fully_shard adds to the module's own class.
    return isinstance(module, nn.Module) and hasattr(module, "set_requires_gradient_sync")


def wrapped_modules(encodes: Sequence[object], modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The DDP and FSDP2 roots given, and those that an encode is or is a method of; ValueError for any other module."""
    if isinstance(modules, nn.Module) or not isinstance(modules, Iterable):
        raise ValueError(
            f"GradCache: modules must be a sequence of DistributedDataParallel or fully_shard roots, got "
            f"{type(modules).__name__}; write modules=[module], or leave it out for a module of one process"
        )
    found = [getattr(encode, "__self__", encode) for encode in encodes]
    if any(is_ddp(inner) or is_fsdp2(inner) for inner in (getattr(one, "_orig_mod", None) for one in found)):
        raise ValueError(
            "GradCache: torch.compile around DistributedDataParallel or fully_shard compiles their synchronisation; "
            "compile the module inside, or its layers, and give the wrapper"
        )
    chosen: list[nn.Module] = []
    for module in [*modules, *(one for one in found if is_ddp(one) or is_fsdp2(one))]:
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
        if not any(module is other for other in chosen):
            chosen.append(module)  # type: ignore[arg-type]
    return chosen


class _Touch(torch.autograd.Function):
    """A zero that depends on every tensor given and passes no gradient: their accumulation hooks still run."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        return (None,) * ctx.count


class _Anchor(nn.Module):
    """Stands in for the wrapped module during the reducing pass; holds it, since its buffers are broadcast then."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, _: Tensor) -> Tensor:
        return _Touch.apply(*(p for p in self.wrapped.parameters() if p.requires_grad))  # type: ignore[return-value]


@contextmanager
def others_refused(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, a call of a DDP or FSDP2 module that is none of `modules` nor inside one is a ValueError.

    It is raised before the module's own forward, which may start a collective that other ranks do not reach.
    """
    known = {id(inner) for module in modules for inner in module.modules()}
    # The classes themselves, for a while, and no global forward hook: torch.compile traces such a hook into every layer
    # compiled meanwhile and compiles them all again once it is gone.
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nobody has sharded anything
    wrappers: list[type] = [nn.parallel.DistributedDataParallel, *([fsdp.FSDPModule] if fsdp else [])]
    for wrapper in wrappers:
        wrapper.__call__ = _checked_call(wrapper, known)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.__call__  # it was inherited


def _checked_call(wrapper: type, known: set[int]) -> Callable:
    def call(module: nn.Module, *args, **kwargs):
        if id(module) not in known:
            name = type(module).__name__ + (f"({type(module.module).__name__})" if is_ddp(module) else "")
            raise ValueError(
                f"GradCache: encode runs through {name}, which is not in modules, so it would reduce gradients in each "
                "backward and not once a step; give modules=[...] with every DistributedDataParallel or fully_shard "
                "root that encode calls"
            )
        return super(wrapper, module).__call__(*args, **kwargs)  # type: ignore[misc]

    return call


@contextmanager
def local_gradients(modules: Sequence[nn.Module], *, reshard: bool) -> Iterator[None]:
    """Inside, forward and backward passes of the modules add to local gradients and start no reduction."""
    with ExitStack() as stack:
        for module in modules:
            if is_ddp(module):
                # Past DDP's own forward: it broadcasts buffers, rebuilds buckets and arms its hooks, and ranks may
                # encode unequally often. The reducing pass does all of that, once.
                stack.enter_context(_forward_replaced(module, module.module.__call__))  # type: ignore[operator]
            else:
                module.set_requires_gradient_sync(False)  # type: ignore[operator]
                module.set_is_last_backward(False)  # type: ignore[operator]
                module.set_reshard_after_backward(reshard)  # type: ignore[operator]
                if not reshard:
                    module.set_reshard_after_forward(False)  # type: ignore[operator]
        yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    module.forward = forward  # shadows the class's method; the module's hooks still run
    try:
        yield
    finally:
        del module.forward


def reduce_gradients(modules: Sequence[nn.Module]) -> None:
    """Start and finish each module's own reduction of what its parameters have gathered, exactly once."""
    for module in modules:
        if is_ddp(module):
            _reduce_ddp(module)
        else:
            _reduce_fsdp2(module)


def _reduce_ddp(module: nn.Module) -> None:
    wrapped = module.module
    module.module = _Anchor(wrapped)  # type: ignore[arg-type]
    try:
        # DDP with device_ids moves its inputs there, and wants one to move.
        anchor = module(torch.empty(0))
    finally:
        module.module = wrapped
    anchor.backward()


def _reduce_fsdp2(module: nn.Module) -> None:
    module.set_requires_gradient_sync(True)  # type: ignore[operator]
    module.set_is_last_backward(True)  # type: ignore[operator]
    module.set_reshard_after_backward(True)  # type: ignore[operator]
    zero = torch.zeros((), device=next(module.parameters()).device, requires_grad=True)
    # The root's own hooks queue the reduction of every group below it; its real forward is not needed for that.
    with _forward_replaced(module, lambda zero: zero * 1.0):
        anchor = module(zero)
    anchor.backward()
