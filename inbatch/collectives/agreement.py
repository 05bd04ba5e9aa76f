"""Let ranks agree before a collective, and exchange small objects and failures.

`group` and ranks are as in `inbatch.collectives`, which passes these names on.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from inbatch.collectives.process_group import ProcessGroup, device_types, global_rank, rank, world_size

T = TypeVar("T")
NOTHING: Mapping[str, Any] = MappingProxyType({})
_PACKET_SIZES = 16
_circumstances: dict[str, Any] = {}

# torch 2.13 renamed the tensor collectives and warns on the old names.
gather_into: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


# ---- the agreement


def agree(
    what: str,
    fields: Mapping[str, Tensor | None] = NOTHING,
    *,
    group: ProcessGroup | None = None,
    same: Mapping[str, int | float | str | bool | None] | None = None,
    sizes: Mapping[str, int] | None = None,
    ragged: Sequence[str] = (),
    error: str | None = None,
) -> dict[str, list[int]]:
    """Check in one small exchange that all ranks are about to do the same thing; if not, all raise the same error.

    Ranks must agree on `what`, on every value in `same` and, for each field, on presence, dtype, trailing shape (dim 0
    may differ; dim 1 too for the fields named in `ragged`) and requires_grad. `error` is a mistake found locally, to be
    raised on all ranks rather than leave the others waiting.

    Returns by rank the sizes of dim 0 of every present field (1 for a 0-d tensor), of dim 1 as "NAME, dim 1" for the
    ragged ones, and the numbers in `sizes`, which may differ. Raises ValueError naming the ranks and what they have;
    with one process, only for `error`.
    Costs one all-gather of 18 integers. It synchronises with the GPU only where the group has no CPU backend: prefer
    backend "cpu:gloo,cuda:nccl" (torch's default). At most 16 sizes. Not for use inside torch.compile.
    """
    size = world_size(group)
    if size == 1 and error is not None:
        raise ValueError(error)
    sizes = dict(sizes or {})
    sizes |= {name: t.shape[0] if t.ndim else 1 for name, t in fields.items() if t is not None}
    sizes |= {f"{name}, dim 1": t.shape[1] for name in ragged if (t := fields[name]) is not None and t.ndim > 1}
    if size == 1:
        return {name: [n] for name, n in sizes.items()}
    assert len(sizes) <= _PACKET_SIZES, f"agree takes at most {_PACKET_SIZES} sizes, got {list(sizes)}"
    types = device_types(group)
    for name, tensor in fields.items():
        if tensor is not None and tensor.device.type not in types and error is None:
            error = (
                f"{name} is on {tensor.device.type} but the process group only communicates on {', '.join(types)}: "
                "move it there, or initialise the group with a backend for both ('cpu:gloo,cuda:nccl')"
            )
    described = {name: _describe(t, 2 if name in ragged else 1) for name, t in fields.items()}
    assert not described.keys() & (same or {}).keys(), "a field and a value of the same name hide each other"
    described |= {name: repr(value) for name, value in {**_circumstances, **(same or {})}.items()}
    # The packet has one length whatever a rank is doing, so that ranks in different calls disagree instead of hanging.
    digest = hashlib.blake2b(repr((what, described)).encode(), digest_size=8).digest()
    packet = [int(error is not None), int.from_bytes(digest, "little", signed=True), *sizes.values()]
    packet += [0] * (_PACKET_SIZES - len(sizes))
    # On the CPU if the group can, since reading the packets back then stalls no GPU.
    mine = torch.tensor(packet, dtype=torch.int64, device="cpu" if "cpu" in types else types[0])
    everyone = mine.new_empty(size * len(packet))
    gather_into(everyone, mine, group=group)
    packets = everyone.view(size, len(packet)).tolist()
    if any(failed or digest != packets[0][1] for failed, digest, *_ in packets):
        reports: list = [None] * size
        dist.all_gather_object(reports, (what, described, error), group=group)
        raise ValueError(_disagreement(reports))
    return {name: [packet[2 + i] for packet in packets] for i, name in enumerate(sizes)}


@contextmanager
def agreeing_on(**values: int | bool) -> Iterator[None]:
    """Add these values to every agreement inside: a rank that skipped a step is noticed at no cost."""
    global _circumstances
    before = _circumstances
    _circumstances = {**before, **values}
    try:
        yield
    finally:
        _circumstances = before


def _describe(tensor: Tensor | None, free_dims: int) -> str:
    """Return all of a tensor that ranks must agree on; the sizes of its first free_dims dimensions may differ."""
    if tensor is None:
        return "None"
    shape = ["rows", "length"][: min(free_dims, tensor.ndim)] + [str(n) for n in tensor.shape[free_dims:]]
    grad = " requiring grad" if tensor.requires_grad and torch.is_grad_enabled() else ""
    return f"({', '.join(shape)}) {str(tensor.dtype).removeprefix('torch.')}{grad}"


def _disagreement(reports: list[tuple[str, dict[str, str], str | None]]) -> str:
    """Return the error message, from every rank's (call, descriptions, mistake)."""
    errors = {f"rank {r}": error for r, (_, _, error) in enumerate(reports) if error is not None}
    if errors:
        return "; ".join(f"{who}: {error}" for who, error in errors.items())
    calls = [what for what, _, _ in reports]
    if len(set(calls)) > 1:
        return f"the ranks are in different calls: {_by_rank(calls)}"
    parts = []
    for name in dict.fromkeys(name for _, described, _ in reports for name in described):
        values = [described.get(name, "nothing of that name") for _, described, _ in reports]
        if len(set(values)) > 1:
            parts.append(f"{name}: {_by_rank(values)}")
    return f"{calls[0]}: the ranks disagree (only numbers of rows may differ): {'; '.join(parts)}"


def _by_rank(values: list[str]) -> str:
    """Put ranks that say the same together: "ranks 0, 1 have x, rank 2 has y"."""
    ranks: dict[str, list[str]] = {}
    for r, value in enumerate(values):
        ranks.setdefault(value, []).append(str(r))
    return ", ".join(
        f"ranks {', '.join(who)} have {value}" if len(who) > 1 else f"rank {who[0]} has {value}"
        for value, who in ranks.items()
    )


# ---- objects and control


def gather_objects(obj: Any, group: ProcessGroup | None = None) -> list:
    """Return every rank's (picklable) object, in rank order."""
    if world_size(group) == 1:
        return [obj]
    agree("gather_objects", group=group)
    objects: list = [None] * world_size(group)
    dist.all_gather_object(objects, obj, group=group)
    return objects


def broadcast_object(obj: T, src: int = 0, group: ProcessGroup | None = None) -> T:
    """Return the (picklable) object of rank `src` of the group."""
    if world_size(group) == 1:
        return obj
    agree("broadcast_object", group=group)
    objects = [obj]
    dist.broadcast_object_list(objects, src=global_rank(src, group), group=group)
    return objects[0]


def barrier(group: ProcessGroup | None = None) -> None:
    """Return once every rank has come here."""
    agree("barrier", group=group)


class OtherRankError(RuntimeError):
    """Report a failure of another rank other than a ValueError, from `together`."""


def together(function: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Call function() on every rank and return its value; if it raises on any rank, every rank raises.

    A rank whose call failed raises its exception. The others raise one that names the failed ranks and their messages:
    a ValueError if the first failure was one, else OtherRankError. The function must not communicate.
    """
    if world_size(group) == 1:
        return function()
    value, failure = None, None
    try:
        value = function()
    except Exception as exception:
        failure = exception
    if any(agree("together", group=group, sizes={"failed": int(failure is not None)})["failed"]):
        mistake = isinstance(failure, ValueError)
        text = None if failure is None else str(failure) if mistake else f"{type(failure).__name__}: {failure}"
        reports = enumerate(gather_objects((mistake, text), group))
        if failure is not None:
            raise failure
        failures = [(mistake, f"rank {r}: {text}") for r, (mistake, text) in reports if text is not None]
        raise (ValueError if failures[0][0] else OtherRankError)("; ".join(text for _, text in failures))
    return value  # pyright: ignore[reportReturnType]


def on_rank_0(function: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Return on every rank what rank 0 of the group computes; an error there is raised on every rank."""
    value = together(lambda: function() if rank(group) == 0 else None, group)
    return broadcast_object(value, group=group)  # type: ignore[return-value]
