"""A session-wide pool of worker processes that run test bodies in real process groups.

Starting a process and importing torch costs seconds, a job in a warm worker costs milliseconds. Every job gets a fresh
default group of exactly the wanted size (file rendezvous) and a time limit: workers that hang are killed and replaced.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

BACKEND = os.environ.get("INBATCH_TEST_BACKEND", "gloo")
GO = b"go"
START_S = 180  # a new worker imports torch and the test module, on a busy machine


def _serve(connection, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the session, which then ends its workers
    stacks = _stacks(folder, os.getpid()).open("w")
    faulthandler.register(signal.SIGUSR1, stacks)  # tells where a worker hangs
    faulthandler.enable(stacks)  # and where it is killed by its own memory
    torch.set_num_threads(1)
    known = 0
    while True:
        try:
            group, call = pickle.loads(connection.recv_bytes())
            try:
                # Imports the test module, so that the job's time limit does not count it.
                body, args = pickle.loads(call)
                if known != len(sys.modules):
                    known = len(sys.modules)
                    gc.collect()
                    gc.freeze()  # all that was imported: GradCache looks through all that is not
            except BaseException:
                connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
                continue
            connection.send_bytes(pickle.dumps((True, None)))
            if connection.recv_bytes() == GO:
                connection.send_bytes(_run_job(group, body, args))
        except EOFError:
            return


def _stacks(folder: str, pid: int | None) -> Path:
    return Path(folder, f"stacks-{pid}")


def _run_job(group: dict, body, args: tuple) -> bytes:
    cuda = torch.device("cuda", group["rank"]) if BACKEND == "nccl" else None
    try:
        if cuda is not None:
            torch.cuda.set_device(cuda)
        torch.manual_seed(0)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda is not None else "gloo", device_id=cuda, **group)
        if cuda is None:
            dist.barrier()  # a body that does not communicate might leave while others still connect
        try:
            return pickle.dumps((True, body(group["rank"], *args)))
        finally:
            dist.destroy_process_group()
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


class Pool:
    def __init__(self) -> None:
        # Workers are forked from a server that has imported what most tests need, but no CUDA and no threads.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["inbatch.train.loop", "tests.tiny_models"])
        self._workers: list = []  # (process, connection)
        self._folder = tempfile.TemporaryDirectory(prefix="inbatch-tests-")
        self._jobs = 0

    def run(self, body, world_size: int, *args, timeout_s: float = 60) -> list:
        """Runs body(rank, *args) on every rank of a fresh group and returns the results by rank.

        body is a module-level function. A failure on any rank is an AssertionError with every rank's traceback.
        """
        if BACKEND == "nccl" and world_size > torch.cuda.device_count():
            pytest.skip(f"needs {world_size} GPUs, found {torch.cuda.device_count()}")
        self._jobs += 1
        group = {
            "init_method": f"file://{self._folder.name}/rendezvous-{self._jobs}",
            "world_size": world_size,
            "timeout": timedelta(seconds=START_S + timeout_s),  # the limit that counts is the one below
        }
        call = pickle.dumps((body, args))
        self._hire(world_size)
        connections = [connection for _, connection in self._workers[:world_size]]
        for rank, connection in enumerate(connections):
            connection.send_bytes(pickle.dumps((group | {"rank": rank}, call)))
        answers = self._collect(connections, START_S)
        ready = all(ok for ok, _ in answers.values()) and len(answers) == world_size
        if ready:
            for connection in connections:
                connection.send_bytes(GO)
            answers = self._collect(connections, timeout_s)
        else:
            for rank, (ok, _) in answers.items():
                if ok:
                    connections[rank].send_bytes(b"")
        failed = [rank for rank, (ok, _) in answers.items() if not ok]
        missing = [rank for rank in range(world_size) if rank not in answers]
        if failed or missing:
            reports = {rank: answers[rank][1] for rank in failed}
            reports |= {rank: self._fate(rank, f"{timeout_s if ready else START_S:g} s") for rank in missing}
            self._replace(missing)
            raise AssertionError("\n".join(f"--- rank {rank} ---\n{reports[rank]}" for rank in sorted(reports)))
        return [answers[rank][1] for rank in range(world_size)]

    def _hire(self, count: int) -> None:
        self._replace([rank for rank, (process, _) in enumerate(self._workers) if not process.is_alive()])
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, self._folder.name), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    @staticmethod
    def _collect(connections: list, limit_s: float) -> dict:
        left_s, answers, open_ = limit_s, {}, dict(zip(connections, range(len(connections)), strict=True))
        while open_ and left_s > 0:
            since = time.monotonic()
            for connection in wait(list(open_), timeout=1):
                rank = open_.pop(connection)
                with contextlib.suppress(EOFError, ConnectionError):  # a worker that died has no answer
                    answers[rank] = pickle.loads(connection.recv_bytes())
                if not answers.get(rank, (False,))[0]:
                    left_s = min(left_s, 10)  # its peers will hardly get further
            left_s -= min(time.monotonic() - since, 1)  # a virtual machine may stand still: that is no test's time
        return answers

    def _fate(self, rank: int, limit: str) -> str:
        process, _ = self._workers[rank]
        process.join(0.1)
        if not process.is_alive():
            stacks = _stacks(self._folder.name, process.pid)
            return f"died with exit code {process.exitcode}\n{stacks.read_text() if stacks.exists() else ''}"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = _stacks(self._folder.name, process.pid)
        return f"no answer within {limit}:\n{stacks.read_text() if stacks.exists() else 'it was still starting'}"

    def _replace(self, ranks: list[int]) -> None:
        for rank in sorted(ranks, reverse=True):
            process, connection = self._workers.pop(rank)
            process.kill()
            process.join()
            connection.close()

    def close(self) -> None:
        self._replace(list(range(len(self._workers))))
        self._folder.cleanup()
