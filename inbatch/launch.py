"""Processes on this machine through torchrun, and what is said of a failure: once, in one line."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT  # the status that shells know


def launch(arguments: list[str], processes: int) -> int:
    """Starts the command `inbatch ARGUMENTS` in several processes on this machine; 1 if one fails, 130 after Ctrl-C."""
    import logging

    from torch.distributed import run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The rank that failed has said why; torchrun's own report would bury it.
    logging.disable(logging.CRITICAL)
    try:
        run.main(["--standalone", "--nproc-per-node", str(processes), "-m", "inbatch", *arguments])
    except Exception as error:  # torchrun's own two classes live in modules that are not public
        if type(error).__name__ not in ("ChildFailedError", "SignalException"):
            raise
        if isinstance(failures := getattr(error, "failures", None), dict):
            _report_killed({rank: failure.exitcode for rank, failure in failures.items()})
        return INTERRUPTED if getattr(error, "sigval", None) == signal.SIGINT else 1
    return 0


def _report_killed(exit_codes: dict[int, int]) -> None:
    """Names the rank that a signal ended, which could not say so. SIGTERM is what torchrun sends to the others."""
    for rank, code in exit_codes.items():
        if code < 0 and -code != signal.SIGTERM:
            hint = " (memory may have run out)" if -code == signal.SIGKILL else ""
            print(
                f"inbatch: error: rank {rank} was ended by {signal.Signals(-code).name}{hint}",
                file=sys.stderr,
            )


def no_fault_of_this_process(error: BaseException) -> str | None:
    """What to say of an end that came from outside, whose traceback would tell nothing; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if type(error).__name__ == "OtherRankError":
        return text
    if "DataLoader worker" in text:
        return f"a process that makes batches was killed: free memory, or lower data.num_workers ({text[:120]})"
    if "gloo" in text and "Timed out" in text:
        return f"another rank hangs, or does something else than this one, which waited too long for it ({text[:160]})"
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or "gloo" in text:
        return f"another rank failed, and says why if it could: its connection is lost ({text[:160]})"
    return None


def report(message: str) -> None:
    """One line on stderr, from one of this machine's ranks, and in the report that torchrun prints last."""
    message = " ".join(message.split())
    if os.environ.get("INBATCH_TRACEBACK"):
        traceback.print_exc()
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


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"inbatch: warning: {message}", file=sys.stderr)
