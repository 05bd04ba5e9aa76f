"""Runs that lose time, a rank or the network: what is said, when they end, and the same figures once they go on."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from inbatch.train import checkpoint
from inbatch.train.run_folder import read_metrics
from tests.helpers import REPOSITORY
from tests.train.test_faults import Running, wait_for, written
from tests.train.test_loop import folder, make_config, train_body  # noqa: F401

TIMEOUT_S = 12
# In every Python that starts below: signals make rank 1 sleep, or end it without a word.
FAULTS = """
import os, signal, time
pauses_s = [2, 600]
if os.environ.get("RANK") == "1":
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(pauses_s.pop(0)))
    signal.signal(signal.SIGUSR2, lambda *_: os._exit(7))
"""


def config_of(data, output):
    settings = {"max_steps": 60, "timeout_minutes": TIMEOUT_S / 60}
    return make_config(data, output, train=settings, checkpoint={"every_steps": 5})


@pytest.fixture(scope="module")
def undisturbed(pool, folder, tmp_path_factory):  # noqa: F811
    """What metrics.jsonl must hold in the end."""
    config = config_of(folder, tmp_path_factory.mktemp("undisturbed") / "run")
    pool.run(train_body, 2, config)
    return metrics(config)


def metrics(config) -> str:
    return "\n".join(map(str, read_metrics(config.train.output_dir)))


@pytest.fixture
def start(folder, tmp_path):  # noqa: F811
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    started = []

    def start_(launcher=None):
        started.append(Running(config_of(folder, tmp_path / "run"), 2, launcher=launcher, python_path=tmp_path))
        return started[-1]

    yield start_
    for running in started:
        running.process.kill()
        running.process.wait()


def goes_on(pool, running, undisturbed):
    """From a checkpoint, to the same figures."""
    found = checkpoint.newest_whole(running.folder / "checkpoints")
    assert found is not None
    assert 0 < found[0] < running.settings.train.max_steps
    pool.run(train_body, 2, running.settings)
    assert metrics(running.settings) == undisturbed


def test_a_pause_below_the_time_out_is_waited_for_and_one_above_it_ends_the_run(pool, start, undisturbed):
    running = start()
    running.wait_for(6)
    rank_1 = running.ranks()[1]
    os.kill(rank_1, signal.SIGUSR1)
    running.wait_for(20)
    os.kill(rank_1, signal.SIGUSR1)
    since = time.monotonic()
    status, errors = running.end()
    assert time.monotonic() - since < TIMEOUT_S + 30
    assert (status, len(errors)) == (1, 1), errors
    assert "no rank got further for 0.2 minutes (train.timeout_minutes)" in errors[0]
    assert re.search(r"rank 1 on \S+: (training(, step \d+)?|saving), in inbatch/", errors[0])
    goes_on(pool, running, undisturbed)


def test_a_rank_that_ends_without_a_word_is_named(pool, start, undisturbed):
    running = start()
    running.wait_for(11)  # the checkpoint of step 5 has its name before that of step 10 is begun
    os.kill(running.ranks()[1], signal.SIGUSR2)
    since = time.monotonic()
    assert running.end() == (7, ["inbatch: error: rank 1 ended with status 7 and said nothing"])
    assert time.monotonic() - since < 30
    goes_on(pool, running, undisturbed)


def test_torchrun_restarts_it_to_the_same_figures(start, undisturbed):
    running = start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m"])
    running.wait_for(11)
    os.kill(running.ranks()[1], signal.SIGUSR2)
    status, errors = running.end()
    assert status == 0, errors
    # The rank that is left sees the other's end itself, or is stopped by torchrun before it does.
    assert all("another rank failed" in line or "stopped by SIGTERM" in line for line in errors), errors
    assert metrics(running.settings) == undisturbed


# ---- two hosts


def ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode


@pytest.fixture
def hosts():
    """Two network namespaces with a link between them: (name, interface, address) of each."""
    made = [
        (f"inbatch{os.getpid()}{side}", f"inb{os.getpid()}{side}", f"10.99.0.{n}") for n, side in enumerate("ab", 1)
    ]
    if shutil.which("ip") is None or any(ip("netns", "add", name) for name, _, _ in made):
        pytest.skip("needs root with CAP_NET_ADMIN, and iproute2, for network namespaces")
    (_, interface, _), (_, peer, _) = made
    try:
        assert ip("link", "add", interface, "type", "veth", "peer", "name", peer) == 0
        for name, interface, address in made:
            assert ip("link", "set", interface, "netns", name) == 0
            assert ip("-n", name, "address", "add", f"{address}/24", "dev", interface) == 0
            for one in (interface, "lo"):
                assert ip("-n", name, "link", "set", one, "up") == 0
        yield made
    finally:
        for name, _, _ in made:
            ip("netns", "delete", name)


def start_on(hosts, config):
    """A rank on each host."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": hosts[0][2], "MASTER_PORT": "29400"}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "inbatch", "train", str(config)],
            env=os.environ | common | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": interface},
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (name, interface, _) in enumerate(hosts)
    ]


def test_a_cut_link_ends_both_hosts_in_time_and_the_run_goes_on(pool, hosts, folder, tmp_path, undisturbed):  # noqa: F811
    settings = config_of(folder, tmp_path / "run")
    ranks = start_on(hosts, written(settings))
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl", 11, ranks[0])
        (name, interface, _) = hosts[1]
        assert ip("-n", name, "link", "set", interface, "down") == 0
        since = time.monotonic()
        said = [rank.communicate(timeout=TIMEOUT_S + 60)[1] for rank in ranks]
        assert time.monotonic() - since < TIMEOUT_S + 30
        for number, (rank, text) in enumerate(zip(ranks, said, strict=True)):
            (line,) = [line for line in text.splitlines() if "inbatch: error" in line]
            assert f"error: rank {1 - number} on " in line
            assert "has not been heard of for 0.2 minutes (train.timeout_minutes); its last word: " in line
            assert "its host or the network to it is gone" in line
            assert rank.returncode == 1
        assert checkpoint.newest_whole(tmp_path / "run" / "checkpoints") is not None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    pool.run(train_body, 2, settings)
    assert metrics(settings) == undisturbed
