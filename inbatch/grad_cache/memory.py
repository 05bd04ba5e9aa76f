"""What a micro-batch's graph weighs, how many graphs fit, and the state that a pass starts from."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

MIB = 1 << 20
# The sizes between which micro-batches are tried on CUDA.
FIRST_TOKENS = 8192
MOST_TOKENS = 262144
LEAST_TOKENS = 512
CPU_TOKENS = 4096  # a CPU gains nothing from more: caches, not launches, bound it


def on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


@contextmanager
def shared_casts() -> Iterator[None]:
    """Let what autocast made of a weight inside serve every pass until the cache is cleared, not one pass alone.

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
        """Let a pass inside draw what it drew and cast as it did, also in a backward thread and outside autocast."""
        self.restore()
        with ExitStack() as stack:
            for kind, dtype, enabled, cached in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cached))
            yield


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Leave no trace of what is drawn inside in the generators."""
    state = PassState()
    try:
        yield
    finally:
        state.restore()


def graph_bytes(forward: Callable[[], Tensor], state: PassState) -> tuple[Tensor, int]:
    """Return the forward's output and the bytes its graph holds: by the allocator on CUDA, by saved tensors on the CPU.

    What a checkpointed block will compute again is in neither count, as it is in neither graph. state: what the forward
    starts from.
    """
    if on_cuda():
        before = torch.cuda.memory_allocated()
        output = forward()
        if output.is_cuda:
            return output, max(0, torch.cuda.memory_allocated() - before)
        state.restore()  # a model on the CPU, in a process that uses a GPU for something else
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output that came back itself would hold its own node, and leak the graph

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    return output, sum(seen.values())


def missing_bytes(modules: Sequence[nn.Module], *, first: bool) -> int:
    """Return what a step is still to allocate: gradients and, the first time, the optimizer's moments."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad and p.grad is None]
    return (3 if first else 1) * sum(p.numel() * p.element_size() for p in parameters)


def free_bytes(reserved: int, device: torch.device) -> int:
    """Return the memory that graphs may take: what is free now, less a tenth, less what is reserved."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        allowed = total * torch.cuda.get_per_process_memory_fraction() - torch.cuda.memory_allocated()
        free = min(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), allowed)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4
    return int(free * 0.9) - reserved


class Trial(NamedTuple):
    """Tokens that went forward and backward, the time that this took, and the memory at its peak."""

    tokens: int
    seconds: float
    peak_bytes: int


def timed_trial(forward_and_backward: Callable[[], None], tokens: int) -> Trial:
    """Return what a micro-batch of `tokens` takes on CUDA."""
    forward_and_backward()  # compiles, tunes, and lets the allocator ask the device for memory
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    forward_and_backward()
    torch.cuda.synchronize()
    return Trial(tokens, time.perf_counter() - start, max(1, torch.cuda.max_memory_allocated() - before))


def fewest_tokens_that_fill(
    attempt: Callable[[int], Trial], *, first: int, most: int, free: int, max_over_ranks: Callable[[int], int]
) -> int:
    """Return the smallest size of a micro-batch, in tokens, that is within 3 % of the fastest; equal on all ranks.

    Tried are `first`, its double and so on up to `most`, as long as each is 3 % faster than the one before and takes
    half of the `free` bytes at most: the rest keeps graphs. A `first` that takes more is made smaller in proportion.
    """
    seconds_a_token: dict[int, float] = {}
    tokens, last = first, float("inf")
    while True:
        trial = attempt(tokens)
        # The slowest rank's time, for all wait for it; the largest share, for a rank may have hardly any rows.
        peak, nanoseconds, used = map(max_over_ranks, (trial.peak_bytes, int(trial.seconds * 1e9), trial.tokens))
        if peak > free // 2:
            if not seconds_a_token:
                return max(LEAST_TOKENS, tokens * free // (2 * peak) // LEAST_TOKENS * LEAST_TOKENS)
            break
        seconds_a_token[tokens] = nanoseconds / used
        if last <= 1.03 * seconds_a_token[tokens] or 2 * tokens > most or 2 * peak > free // 2:
            break
        tokens, last = 2 * tokens, seconds_a_token[tokens]
    fastest = min(seconds_a_token.values())
    return next(tokens for tokens, seconds in seconds_a_token.items() if seconds <= 1.03 * fastest)
