"""The process group itself: who is in it, and how it starts and stops. Re-exported by `inbatch.collectives`."""

import functools
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from inbatch.collectives.watch import Watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:  # torch can be built without torch.distributed; one process needs none of it
    ProcessGroup = getattr(dist, "ProcessGroup", object)

P = ParamSpec("P")
T = TypeVar("T")
_PATIENCE_S = 12 * 3600  # of collectives, where ranks are watched: one may embed or write for hours
_bound_device: torch.device | None = None
_watch: Watch | None = None


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that communicates: torch.compile leaves it uncompiled.

    Compiled, it would keep the number of processes of its first call, and take seconds to compile into many parts.
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **options)  # type: ignore[call-arg]
        return function(*args, **options)

    return call


def world_size(group: ProcessGroup | None = None) -> int:
    """Return the number of processes in the group; 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("this process is not a member of the given process group: give a group it belongs to")
    return size


def rank(group: ProcessGroup | None = None) -> int:
    """Return this process's position in the group; 0 without a process group."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def global_rank(group_rank: int, group: ProcessGroup | None) -> int:
    """Return the position in the default group of the group's rank `group_rank`."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def device_types(group: ProcessGroup | None = None) -> list[str]:
    """Return the types of device whose tensors the group can send."""
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]


def start(
    backend: str | None = None,
    timeout_s: float = 300,
    *,
    say: Callable[[str], object] | None = None,
    setting: str = "timeout_s",
) -> torch.device:
    """Initialise the default process group from torchrun's environment and return this process's device.

    Without that environment (RANK is not set) nothing is initialised: one process. An existing process group is kept.
    backend None: NCCL between GPUs (and gloo for CPU tensors) where there are any, else gloo. "gloo": everything on the
    CPU. timeout_s bounds every collective. With `say` it bounds how long all ranks may stand still, or one be silent:
    then every rank calls say(message) and ends, see `inbatch.collectives.watch`. setting: the message's name for it.
    Raises ValueError if the environment is incomplete or contradicts itself, or there are fewer GPUs than processes.
    """
    global _bound_device, _watch
    use_cuda = backend != "gloo" and torch.cuda.is_available()
    distributed = _torchrun_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if distributed else 0
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK is {local_rank} but this machine shows {torch.cuda.device_count()} GPUs: "
            "start no more processes than GPUs, or use the backend 'gloo' to run on the CPU"
        )
    _bound_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(_bound_device)
    if distributed and not dist.is_initialized():
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        prefix = "inbatch"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            prefix += f"/{_attempt(store, rank, size, timeout_s)}"
        store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        if say is not None and size > 1:
            _watch = Watch(rank, size, timeout_s=timeout_s, setting=setting, say=say, prefix=prefix)
        dist.init_process_group(
            backend or ("cpu:gloo,cuda:nccl" if use_cuda else "gloo"),
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s if say is None else _PATIENCE_S),
            device_id=_bound_device if use_cuda else None,
        )
    return _bound_device


def _attempt(store: Any, rank: int, world_size: int, timeout_s: float) -> int:
    """Return a number that only the ranks of this start share; RuntimeError if some do not come within `timeout_s`.

    torchrun's store outlives a restart and still holds what dead ranks wrote. Rank 0 draws the number. The others ask
    for it under new names, and confirm it: a request without a confirmation may be a dead rank's.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"inbatch/asks/{rank}", name)
        attempt = int(store.get(f"inbatch/answer/{name}"))
        store.set(f"inbatch/has/{attempt}/{rank}", "")
        return attempt
    attempt, missing, start = store.add("inbatch/attempts", 1), [*range(1, world_size)], time.monotonic()
    while missing:
        for other in missing:
            if store.check([f"inbatch/asks/{other}"]):
                store.set(f"inbatch/answer/{store.get(f'inbatch/asks/{other}').decode()}", str(attempt))
        missing = [other for other in missing if not store.check([f"inbatch/has/{attempt}/{other}"])]
        if missing and time.monotonic() - start > timeout_s:
            raise RuntimeError(f"ranks {missing} did not start within {timeout_s / 60:g} minutes")
        time.sleep(0.01)
    return attempt


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """Hold a process group of this process alone, where there is none: FSDP2 needs one."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _torchrun_environment() -> bool:
    """Return True if torchrun (or the like) started this process; half an environment would hang, so it is an error."""
    size, my_rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if my_rank is None:
        if size != "1":
            raise ValueError(f"WORLD_SIZE is {size} but RANK is not set: start with torchrun, or unset WORLD_SIZE")
        return False
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK")
    if not (my_rank.isdecimal() and size.isdecimal() and int(my_rank) < int(size)):
        raise ValueError(f"RANK is {my_rank} and WORLD_SIZE is {size}: expected 0 <= RANK < WORLD_SIZE")
    return True


def stop() -> None:
    """Destroy the default process group, if there is one."""
    global _watch
    if _watch is not None:
        _watch = _watch.close()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Return this process's device: the one that `start` bound, else the current GPU, else the CPU."""
    if _bound_device is not None:
        return _bound_device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
