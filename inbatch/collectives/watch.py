"""Watch the ranks of a job: one that hangs or vanishes is named, and every rank ends, within a time-out.

Each rank sends rank 0 a beat through the store of the rendezvous: its progress, its activity, and its place in the
code. Rank 0 judges, and the others read its verdict with its beat. Long work that uses the processor or the disk is not
taken for a hang, and a hang is named whatever the others wait in. Collectives themselves need no tight limit.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

PACKAGE = str(Path(__file__).parents[1])
_COLLECTIVES = str(Path(__file__).parent)
_IDLE_SHARE = 0.02  # of a processor: threads that only wait use less
_IDLE_BYTES = 4 << 20


class _Activity:
    """Hold the activity of the main thread, in plain attributes: they are set in every step."""

    name, steps_only, ticks = "starting", False, 0


def doing(activity: str, *, steps_only: bool = False) -> None:
    """Name this rank's activity from here on, which counts as progress. steps_only: only `tick` does afterwards.

    Otherwise use of the processor and the disk counts too, such as opening data, which may take long. With steps_only
    it does not: a rank that waits for its GPU may keep the processor busy.
    """
    _Activity.name, _Activity.steps_only = activity, steps_only
    tick()


def tick() -> None:
    """Count a step of progress."""
    _Activity.ticks += 1


class Watch:
    """Watch in threads, until `close`.

    After `timeout_s` without progress of any rank, or without a beat from some rank, every rank that still can calls
    say(message) and ends with status 1.
    """

    def __init__(
        self, rank: int, world_size: int, *, timeout_s: float, setting: str, say: Callable[[str], object], prefix: str
    ):
        self._prefix = f"{prefix}/watch"
        self._rank, self._others = rank, [r for r in range(world_size) if r != rank]
        self._timeout_s, self._say = timeout_s, say
        self._limit = f"{timeout_s / 60:g} minutes ({setting})"
        self._interval_s = min(5.0, timeout_s / 10)
        self._main = threading.main_thread().ident
        self._beats: dict[int, dict[str, Any]] = {}
        self._verdict: str | None = None
        self._closed = threading.Event()
        for run in (self._exchange, self._judge):
            threading.Thread(target=run, daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    # ---- the beats

    def _exchange(self) -> None:
        """Send and fetch beats in a loop; where a link is cut this blocks or fails, and no beat arrives."""
        progress, sources = 0, self._others if self._rank == 0 else [0]
        store, used = None, _used()
        for number in itertools.count():
            if self._closed.wait(self._interval_s if number else 0):
                return
            if _progressed(used, now := _used(), self._timeout_s):
                progress, used = progress + 1, now
            at, waits = _place(sys._current_frames().get(self._main or 0))
            self._beats[self._rank] = {
                "number": number,
                "progress": progress,
                "host": socket.gethostname(),
                "doing": _Activity.name + at,
                "waits": waits,
            }
            if self._rank == 0:
                self._beats[0]["verdict"] = self._verdict
            with contextlib.suppress(RuntimeError):  # the store's server ended, or cannot be reached
                store = store or self._connect()
                store.set(str(self._rank), json.dumps(self._beats[self._rank]))
                for rank in sources:
                    if store.check([str(rank)]):
                        self._beats[rank] = json.loads(store.get(str(rank)))

    def _connect(self) -> Any:
        """Return a connection for this thread: sharing the main thread's would wait for its long waits."""
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=self._timeout_s))
        return PrefixStore(self._prefix, store)

    # ---- the verdict

    def _judge(self) -> None:
        before = time.monotonic()
        silent_s = dict.fromkeys(self._others if self._rank == 0 else [0], 0.0)
        idle_s, heard, progress = 0.0, dict.fromkeys(silent_s, -1), None
        while not self._closed.wait(self._interval_s / 2):
            now = time.monotonic()
            passed_s, before = min(now - before, self._interval_s), now  # a machine may stand still, and nobody hangs
            if verdict := self._beats.get(0, {}).get("verdict"):
                self._finish(verdict)
                return
            beats = dict(self._beats)
            for rank in silent_s:
                number = beats.get(rank, {}).get("number", -1)
                silent_s[rank] = 0.0 if number != heard[rank] else silent_s[rank] + passed_s
                heard[rank] = number
            so_far = {rank: beat["progress"] for rank, beat in beats.items()}
            idle_s = 0.0 if so_far != progress else idle_s + passed_s
            progress = so_far
            silent = [rank for rank, seconds in silent_s.items() if seconds > self._timeout_s]
            if silent:
                self._verdict = "; ".join(self._of_silence(rank, beats) for rank in silent)
            elif self._rank == 0 and idle_s > self._timeout_s:
                self._verdict = self._of_hanging(beats)
            if self._verdict and self._rank:
                self._finish(self._verdict)
                return

    def _finish(self, verdict: str) -> None:
        self._say(verdict)
        if self._rank == 0:
            time.sleep(2 * self._interval_s)  # for the others to read it: the store may end with this process
        sys.stderr.flush()
        os._exit(1)

    def _of_silence(self, rank: int, beats: dict[int, dict[str, Any]]) -> str:
        if rank not in beats:
            return f"rank {rank} has not been heard of since the start, {self._limit} ago: did it start?"
        return (
            f"rank {rank} on {beats[rank]['host']} has not been heard of for {self._limit}; its last word: "
            f"{beats[rank]['doing']}. It was stopped, or its host or the network to it is gone"
        )

    def _of_hanging(self, beats: dict[int, dict[str, Any]]) -> str:
        guilty = {rank: beat for rank, beat in beats.items() if not beat["waits"]} or beats
        said = "; ".join(f"rank {rank} on {beat['host']}: {beat['doing']}" for rank, beat in sorted(guilty.items()))
        others = "; the other ranks wait" if len(guilty) < len(beats) else ""
        return f"no rank got further for {self._limit}. {said}{others}"


def _place(frame: Any) -> tuple[str, bool]:
    """Return where a thread is, and whether it waits for other ranks: whether it is in a collective of ours."""
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "", False
    code = frame.f_code
    file = os.path.relpath(code.co_filename, os.path.dirname(PACKAGE))
    return f", in {file}, line {frame.f_lineno} ({code.co_name})", code.co_filename.startswith(_COLLECTIVES)


def _used() -> tuple[float, int, int]:
    """Return the processor's seconds and the bytes of files of this process and its children, and its ticks."""
    seconds, moved = 0.0, 0
    tasks = [*Path("/proc/self/task").iterdir()]
    pids = ["self"]
    for task in tasks:
        with contextlib.suppress(OSError):
            pids += (task / "children").read_text().split()
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            moved += sum(int(line.split()[1]) for line in lines[:2])
    return seconds, moved, _Activity.ticks


def _progressed(before: tuple[float, int, int], now: tuple[float, int, int], timeout_s: float) -> bool:
    if now[2] != before[2]:
        return True
    busy = abs(now[0] - before[0]) > _IDLE_SHARE * timeout_s or abs(now[1] - before[1]) > _IDLE_BYTES
    return busy and not _Activity.steps_only
