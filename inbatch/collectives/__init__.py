"""Collectives over rows: gathers with gradient, uneven and empty ranks, any process group.

The only package that names torch.distributed's operations.
`group` is a ProcessGroup, None is the default group, or a world of one process where none is initialised. A rank is a
position within its group. `rows` are the row counts (sizes of dim 0) by rank, as `agree` returns them.
"""

from inbatch.collectives.agreement import OtherRankError as OtherRankError
from inbatch.collectives.agreement import agree as agree
from inbatch.collectives.agreement import agreeing_on as agreeing_on
from inbatch.collectives.agreement import barrier as barrier
from inbatch.collectives.agreement import broadcast_object as broadcast_object
from inbatch.collectives.agreement import gather_objects as gather_objects
from inbatch.collectives.agreement import on_rank_0 as on_rank_0
from inbatch.collectives.agreement import together as together
from inbatch.collectives.gather import all_gather as all_gather
from inbatch.collectives.gather import all_reduce as all_reduce
from inbatch.collectives.gather import gather_rows as gather_rows
from inbatch.collectives.gather import max_over_ranks as max_over_ranks
from inbatch.collectives.gather import reduce_scatter_rows as reduce_scatter_rows
from inbatch.collectives.process_group import ProcessGroup as ProcessGroup
from inbatch.collectives.process_group import device as device
from inbatch.collectives.process_group import device_types as device_types
from inbatch.collectives.process_group import global_rank as global_rank
from inbatch.collectives.process_group import group_of_one as group_of_one
from inbatch.collectives.process_group import rank as rank
from inbatch.collectives.process_group import start as start
from inbatch.collectives.process_group import stop as stop
from inbatch.collectives.process_group import uncompiled as uncompiled
from inbatch.collectives.process_group import world_size as world_size
from inbatch.collectives.ring import RingShift as RingShift
from inbatch.collectives.ring import held as held
from inbatch.collectives.ring import ring_shift as ring_shift
from inbatch.collectives.watch import doing as doing
from inbatch.collectives.watch import tick as tick
