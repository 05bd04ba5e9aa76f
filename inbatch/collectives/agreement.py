"""What ranks tell one another: that they agree before a collective, small objects, failures. Through `collectives`.

`group` and ranks are as in `inbatch.collectives`, which passes these names on.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from inbatch.collectives.disagreement import describe, disagreement
from inbatch.collectives.process_group import ProcessGroup, device_types, global_rank, world_size

T = TypeVar("T")
_PACKET_SIZES = 16

# torch 2.13 renamed the tensor collectives and warns on the old names.
gather_into: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


# ---- the agreement


def agree(
    what: str,
    fields: Mapping[str, Tensor | None],
    *,
    group: ProcessGroup | None = None,
    same: Mapping[str, int | float | str | bool | None] | None = None,
    ragged: Sequence[str] = (),
    error: str | None = None,
) -> dict[str, list[int]]:
    """Checks in one small exchange that all ranks are about to do the same thing; if not, all raise the same error.

    Ranks must agree on `what`, on every value in `same` and, for each field, on presence, dtype, trailing shape (dim 0
    may differ; dim 1 too for the fields named in `ragged`) and requires_grad. `error` is a mistake found locally, to be
    raised on all ranks rather than leave the others waiting.

    Returns the sizes of dim 0 by rank for every present field (1 for a 0-d tensor), and of dim 1 as "NAME, dim 1" for
    the ragged ones. Raises ValueError naming the ranks and what they have; with one process, only for `error`.
    Costs one all-gather of 18 integers. It synchronises with the GPU only where the group has no CPU backend: prefer
    backend "cpu:gloo,cuda:nccl" (torch's default). At most 16 sizes. Not for use inside torch.compile.
    """
    size = world_size(group)
    if size == 1 and error is not None:
        raise ValueError(error)
    sizes = {name: t.shape[0] if t.ndim else 1 for name, t in fields.items() if t is not None}
    sizes |= {f"{name}, dim 1": t.shape[1] for name in ragged if (t := fields[name]) is not None and t.ndim > 1}
    if size == 1:
        return {name: [n] for name, n in sizes.items()}
    assert len(sizes) <= _PACKET_SIZES, f"agree takes at most {_PACKET_SIZES} sizes, got {list(sizes)}"
    error = error or _wrong_device(fields, group)
    described = {name: describe(t, 2 if name in ragged else 1) for name, t in fields.items()}
    assert not described.keys() & (same or {}).keys(), "a field and a value of the same name hide each other"
    described |= {name: repr(value) for name, value in (same or {}).items()}
    # The packet has one length whatever a rank is doing, so that ranks in different calls disagree instead of hanging.
    digest = hashlib.blake2b(repr((what, described)).encode(), digest_size=8).digest()
    packet = [int(error is not None), int.from_bytes(digest, "little", signed=True), *sizes.values()]
    packets = _exchange(packet + [0] * (_PACKET_SIZES - len(sizes)), group)
    if any(failed or digest != packets[0][1] for failed, digest, *_ in packets):
        raise ValueError(disagreement(gather_objects((what, described, error), group)))
    return {name: [packet[2 + i] for packet in packets] for i, name in enumerate(sizes)}


def _exchange(numbers: list[int], group: ProcessGroup | None) -> list[list[int]]:
    mine = torch.tensor(numbers, dtype=torch.int64, device=_packet_device(group))
    everyone = mine.new_empty(world_size(group) * len(numbers))
    gather_into(everyone, mine, group=group)
    return everyone.view(-1, len(numbers)).tolist()


def _wrong_device(fields: Mapping[str, Tensor | None], group: ProcessGroup | None) -> str | None:
    types = device_types(group)
    for name, tensor in fields.items():
        if tensor is not None and tensor.device.type not in types:
            return (
                f"{name} is on {tensor.device.type} but the process group only communicates on {', '.join(types)}: "
                "move it there, or initialise the group with a backend for both ('cpu:gloo,cuda:nccl')"
            )
    return None


def _packet_device(group: ProcessGroup | None) -> torch.device:
    """Where small packets travel: on the CPU if the group can, since reading them back then stalls no GPU."""
    types = device_types(group)
    return torch.device("cpu" if "cpu" in types else types[0])


# ---- objects and control


def gather_objects(obj: Any, group: ProcessGroup | None = None) -> list:
    """Every rank's (picklable) object, in rank order."""
    if world_size(group) == 1:
        return [obj]
    objects: list = [None] * world_size(group)
    dist.all_gather_object(objects, obj, group=group)
    return objects


def broadcast_object(obj: T, src: int = 0, group: ProcessGroup | None = None) -> T:
    """The (picklable) object of rank `src` of the group."""
    if world_size(group) == 1:
        return obj
    objects = [obj]
    dist.broadcast_object_list(objects, src=global_rank(src, group), group=group)
    return objects[0]


def barrier(group: ProcessGroup | None = None) -> None:
    """Returns once every rank has come here."""
    if world_size(group) > 1:
        _exchange([0], group)


class OtherRankError(RuntimeError):
    """What `together` raises for a failure of another rank that was no ValueError."""


def together(function: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Calls function() on every rank and returns its value; if it raises on any rank, every rank raises.

    A rank whose own call failed raises its own exception. The others raise one that names the failed ranks and their
    messages: a ValueError if the first failure was one, else a RuntimeError (OtherRankError). The function must not
    communicate.
    """
    if world_size(group) == 1:
        return function()
    value, failure = None, None
    try:
        value = function()
    except Exception as exception:
        failure = exception
    if any(failed for (failed,) in _exchange([failure is not None], group)):
        is_value_error = isinstance(failure, ValueError)
        text = str(failure) if is_value_error else f"{type(failure).__name__}: {failure}"
        reports = gather_objects(None if failure is None else (is_value_error, text), group)
        if failure is not None:
            raise failure
        failures = {r: report for r, report in enumerate(reports) if report is not None}
        message = "; ".join(f"rank {r}: {text}" for r, (_, text) in failures.items())
        raise ValueError(message) if next(iter(failures.values()))[0] else OtherRankError(message)
    return value  # pyright: ignore[reportReturnType]
