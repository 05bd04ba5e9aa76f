"""A session-wide pool of worker processes that run test bodies in real process groups.

Spawning a process and importing torch costs seconds, a job in a warm worker costs milliseconds. Every job gets a fresh
default group of exactly the wanted size (file rendezvous) and a time limit: workers that hang are killed and replaced.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist

BACKEND = os.environ.get("INBATCH_TEST_BACKEND", "gloo")


def _serve(connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the session, which then ends its workers
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_run_job(job))


def _run_job(job: bytes) -> bytes:
    try:
        # The header comes apart, so that a body that cannot be imported here is reported like any other failure.
        (rank, world_size, rendezvous, timeout_s), payload = pickle.loads(job)
        cuda = torch.device("cuda", rank) if BACKEND == "nccl" else None
        if cuda is not None:
            torch.cuda.set_device(cuda)
        body, args = pickle.loads(payload)
        torch.manual_seed(0)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda is not None else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=cuda,
        )
        try:
            return pickle.dumps((True, body(rank, *args)))
        finally:
            dist.destroy_process_group()
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


class Pool:
    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
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
        rendezvous = os.path.join(self._folder.name, f"rendezvous-{self._jobs}")
        payload = pickle.dumps((body, args))
        self._hire(world_size)
        connections = [connection for _, connection in self._workers[:world_size]]
        for rank, connection in enumerate(connections):
            connection.send_bytes(pickle.dumps(((rank, world_size, rendezvous, timeout_s), payload)))
        answers = self._collect(connections, time.monotonic() + timeout_s)
        failed = [rank for rank, (ok, _) in answers.items() if not ok]
        missing = [rank for rank in range(world_size) if rank not in answers]
        if failed or missing:
            self._replace(missing)
            report = "\n".join(f"--- rank {rank} ---\n{answers[rank][1]}" for rank in sorted(failed))
            hung = f"ranks {missing} did not answer within {timeout_s:g} s (hung or died)\n" if missing else ""
            raise AssertionError(f"{hung}{report}")
        return [answers[rank][1] for rank in range(world_size)]

    def _hire(self, count: int) -> None:
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    @staticmethod
    def _collect(connections: list, deadline: float) -> dict:
        answers, open_ = {}, dict(zip(connections, range(len(connections)), strict=True))
        while open_ and (left_s := deadline - time.monotonic()) > 0:
            for connection in wait(list(open_), timeout=left_s):
                rank = open_.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    answers[rank] = (False, "the worker process died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 15)  # its peers will hardly get further
        return answers

    def _replace(self, ranks: list[int]) -> None:
        dead = {rank for rank, (process, _) in enumerate(self._workers) if not process.is_alive()}
        for rank in sorted(dead.union(ranks), reverse=True):
            process, connection = self._workers.pop(rank)
            process.kill()
            process.join()
            connection.close()

    def close(self) -> None:
        self._replace(list(range(len(self._workers))))
        self._folder.cleanup()
