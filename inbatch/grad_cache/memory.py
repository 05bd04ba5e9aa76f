"""What a micro-batch's graph weighs, how many graphs fit, and the state that a pass starts from."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

MIB = 1 << 20
# Enough to fill any accelerator; beyond it larger micro-batches gain nothing and leave fewer graphs to keep.
MOST_TOKENS = 65536
FIRST_TOKENS = 16384
LEAST_TOKENS = 512
CPU_TOKENS = 4096  # a CPU gains nothing from more: caches, not launches, bound it


def on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


@contextmanager
def shared_casts() -> Iterator[None]:
    """Inside, what autocast made of a weight serves every pass until the cache is cleared, not one pass alone.

    Autocast forgets its casts where the outermost of its contexts ends; this counts as one further out.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


class PassState:
    """The generators of the CPU and the current CUDA device, and autocast, as they are now."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if on_cuda() else None
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in ("cpu", "cuda")
        ]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, a pass draws what it drew and casts as it did, also in a backward thread and outside autocast."""
        self.restore()
        with ExitStack() as stack:
            for kind, dtype, enabled, cached in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cached))
            yield


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in the generators."""
    state = PassState()
    try:
        yield
    finally:
        state.restore()


def graph_bytes(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return the forward's output and the bytes its graph holds: by the allocator on CUDA, by saved tensors on the CPU.

    What a checkpointed block will compute again is in neither count, as it is in neither graph.
    """
    if on_cuda():
        before = torch.cuda.memory_allocated()
        output = forward()
        return output, max(0, torch.cuda.memory_allocated() - before)
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output that came back itself would hold its own node, and leak the graph

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    return output, sum(seen.values())


def free_bytes(modules: Sequence[nn.Module]) -> int:
    """Return the memory that graphs may take: what is free now, less a tenth, less gradients still to be made."""
    if on_cuda():
        free, total = torch.cuda.mem_get_info()
        allowed = total * torch.cuda.get_per_process_memory_fraction() - torch.cuda.memory_allocated()
        free = min(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), allowed)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad and p.grad is None]
    # Before the first step neither gradients nor the optimizer's two moments exist.
    return int(free * 0.9) - 3 * sum(p.numel() * p.element_size() for p in parameters)


def tokens_that_fit(forward_and_backward: Callable[[], None], tokens: int, free: int) -> int:
    """Return the tokens of a micro-batch whose peak takes an eighth of `free` bytes, by a trial with `tokens`."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_and_backward()
    peak = max(1, torch.cuda.max_memory_allocated() - before)
    return min(MOST_TOKENS, max(LEAST_TOKENS, int(free / 8 / peak * tokens) // 1024 * 1024))
