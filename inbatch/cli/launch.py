"""Processes on this machine, and the report of a failure: once, in one line."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT  # the status that shells know
REPORT_FD = "INBATCH_REPORT_FD"
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_S = 5  # for the others to say what they know, once a rank has failed
_PR_SET_PDEATHSIG = 1
_last_word = threading.Event()


def launch(arguments: list[str], processes: int) -> int:
    """Run the command `inbatch ARGUMENTS` in several processes on this machine; return 0 or the first failure's status.

    SIGINT, SIGTERM and SIGHUP go to all of them. None outlives this process, however it ends.
    """
    with socket.socket() as reserved:
        # Bound but not listened on: the kernel gives the port to no other process, and rank 0 may listen on it.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        environment = os.environ | {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(reserved.getsockname()[1]),
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        environment[REPORT_FD] = str(writing)
        ranks: list[subprocess.Popen] = []
        before = {number: signal.getsignal(number) for number in _STOPPING}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, lambda number, _: [process.send_signal(number) for process in ranks])
        parent = os.getpid()
        try:
            for rank in range(processes):
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "inbatch", *arguments],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        pass_fds=[writing],
                        preexec_fn=lambda: _end_with(parent),
                    )
                )
            os.close(writing)
            return _wait(ranks, reading)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
            os.close(reading)
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with(parent: int) -> None:
    """Make the kernel kill this new process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(ranks: list[subprocess.Popen], reading: int) -> int:
    """Wait for the ranks, print why the first one failed, and return its status.

    The first one is not the first to end: of a killed process, the kernel closes the connections before it says so,
    and the ranks that lose theirs may be quicker.
    """
    said, ended = b"", {}
    deadline = float("inf")
    while len(ended) < len(ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
        said += _read(reading)
        for rank, process in enumerate(ranks):
            if rank not in ended and process.poll() is not None:
                ended[rank] = process.returncode
                if process.returncode:
                    deadline = min(deadline, time.monotonic() + _PATIENCE_S)
    reports = [json.loads(line) for line in (said + _read(reading)).splitlines()]
    failed = {rank: status for rank, status in ended.items() if status}
    silent = {rank: failed[rank] for rank in failed.keys() - {report["rank"] for report in reports}}
    _report_killed(silent)
    # A rank that lost its connection to another says less than that rank's report, or its end.
    causes = [report for report in reports if report["cause"]] or ([] if silent else reports)
    first_hand = [f"rank {report['rank']}: {report['message']}" for report in causes if report["message"]]
    for message in dict.fromkeys(report["message"] for report in causes if report["message"]):
        if not any(words in message for words in first_hand):  # `together` repeats on every rank what failed on one
            print(f"inbatch: error: {message}", file=sys.stderr)
    to_blame = {report["rank"] for report in causes} | silent.keys()
    status = next((failed[rank] for rank in failed if rank in to_blame), next(iter(failed.values()), 0))
    return status if status >= 0 else 128 - status


def _read(reading: int) -> bytes:
    try:
        return os.read(reading, 1 << 16)
    except BlockingIOError:
        return b""


def _report_killed(statuses: dict[int, int]) -> None:
    """Name the ranks that ended without a report."""
    for rank, status in sorted(statuses.items()):
        how = f"ended with status {status} and said nothing"
        if status < 0:
            hint = " (memory may have run out)" if -status == signal.SIGKILL else ""
            how = f"was ended by {signal.Signals(-status).name}{hint}"
        print(f"inbatch: error: rank {rank} {how}", file=sys.stderr)


def in_one_line(error: BaseException) -> tuple[str, bool] | None:
    """Return the message for a failure whose traceback would not help, and True if it began in this process.

    None for other failures.
    """
    text, name = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", True
    if name == "OutOfMemoryError":
        remedy = "lower train.micro_batch_tokens and train.keep_graph_mib, or --batch-tokens"
        return f"the memory of the GPU is exhausted: {remedy} ({text[:160]})", True
    if name == "OtherRankError":
        return text, False
    if "DataLoader worker" in text:
        return f"a process that makes batches was killed: free memory, or lower data.num_workers ({text[:120]})", False
    if "gloo" in text and "Timed out" in text:
        return f"another rank hangs, or is in another call than this one, which waited too long ({text[:160]})", False
    if name in ("DistBackendError", "DistNetworkError", "DistStoreError") or "gloo" in text:
        return f"another rank failed, and says why if it could: its connection is lost ({text[:160]})", False
    return None


def report(message: str, *, cause: bool = True) -> None:
    """Print why this process ends: one line on stderr, from one of this machine's ranks.

    A launcher of ours prints it for the rank; torchrun repeats it in its last report. cause: False if another rank is
    to blame, whose report may say more.
    """
    if _last_word.is_set():
        return
    message = " ".join(message.split())
    if os.environ.get("INBATCH_TRACEBACK"):
        traceback.print_exc()
    if REPORT_FD in os.environ:
        line = {"rank": int(os.environ["RANK"]), "message": message[:3000], "cause": cause}
        os.write(int(os.environ[REPORT_FD]), f"{json.dumps(line)}\n".encode())
        return
    torchrun_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    first = True
    if torchrun_file:
        Path(torchrun_file).write_text(json.dumps({"message": message}), encoding="utf-8")
        # <job>/<attempt>/<local rank>/error.json: the ranks of an attempt share a folder, where one creates this file.
        try:
            (Path(torchrun_file).parents[1] / "inbatch-error").touch(exist_ok=False)
        except FileExistsError:
            first = False
    if first:
        print(f"inbatch: error: {message}", file=sys.stderr)


def report_last(message: str) -> None:
    """Report this and nothing after it: later errors of the main thread are consequences."""
    report(message)
    _last_word.set()


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"inbatch: warning: {message}", file=sys.stderr)
