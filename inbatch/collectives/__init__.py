"""Collectives over rows: gathers with gradient, uneven and empty ranks, any process group.

The only package that names torch.distributed's operations.
`group` is a ProcessGroup, None is the default group, or a world of one process where none is initialised. A rank is a
position within its group. `rows` are the row counts (sizes of dim 0) by rank, as `agree` returns them.
"""

from inbatch.collectives.agreement import (
    OtherRankError,
    agree,
    agreeing_on,
    barrier,
    broadcast_object,
    gather_objects,
    together,
)
from inbatch.collectives.gather import all_gather, all_reduce, gather_rows, max_over_ranks, reduce_scatter_rows
from inbatch.collectives.process_group import (
    ProcessGroup,
    device,
    device_types,
    global_rank,
    group_of_one,
    rank,
    start,
    stop,
    uncompiled,
    world_size,
)
from inbatch.collectives.ring import RingShift, held, ring_shift
from inbatch.collectives.watch import doing, tick

__all__ = [
    "OtherRankError",
    "ProcessGroup",
    "RingShift",
    "agree",
    "agreeing_on",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast_object",
    "device",
    "device_types",
    "doing",
    "gather_objects",
    "gather_rows",
    "global_rank",
    "group_of_one",
    "held",
    "max_over_ranks",
    "rank",
    "reduce_scatter_rows",
    "ring_shift",
    "start",
    "stop",
    "tick",
    "together",
    "uncompiled",
    "world_size",
]
