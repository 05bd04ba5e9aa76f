"""Ranks that hang are named in time, and those that work are waited for."""

import os
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers import REPOSITORY

TIMEOUT_S = 3
CODE = """
import sys, time
from inbatch import collectives
from inbatch.cli.launch import report_last

def lunch():
    time.sleep(600)

def work():
    until = time.monotonic() + 3 * TIMEOUT_S
    while time.monotonic() < until:
        sum(range(10_000))

collectives.start("gloo", timeout_s=TIMEOUT_S, say=report_last, setting="patience")
if collectives.rank() == int(sys.argv[2]):
    collectives.doing("table laid", steps_only=sys.argv[3] == "steps")
    {"lunch": lunch, "work": work}[sys.argv[1]]()
collectives.barrier()
print("met", flush=True)
collectives.stop()
""".replace("TIMEOUT_S", str(TIMEOUT_S))


def _run(*arguments: str) -> tuple[list[int], list[str], float]:
    """The statuses, what both ranks wrote, and the seconds until both had ended."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    since = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, *arguments],
            env=environment | {"RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], said, time.monotonic() - since


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_with_what_it_does(rank):
    statuses, said, seconds = _run("lunch", str(rank), "any")
    assert statuses == [1, 1], said
    assert seconds < TIMEOUT_S + 30, "the start of both processes included"
    for text in said:
        (line,) = [line for line in text.splitlines() if "inbatch: error" in line]
        assert f"no rank got further for {TIMEOUT_S / 60:g} minutes (patience). rank {rank} on " in line
        assert "table laid; the other ranks wait" in line


def test_a_rank_that_works_is_waited_for():
    statuses, said, _ = _run("work", "1", "any")
    assert (statuses, [text.count("met") for text in said]) == ([0, 0], [1, 1]), said


def test_where_only_steps_count_a_busy_rank_hangs():
    statuses, said, _ = _run("work", "0", "steps")
    assert statuses == [1, 1], said
    assert "rank 0 on" in said[1]
