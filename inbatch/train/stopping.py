"""SIGTERM and SIGHUP: a run saves a checkpoint and ends with one line and a status that schedulers understand."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """Report that a signal asked this process to stop; its code is 128 + the signal's number."""

    def __init__(self, number: int, what_is_kept: str = ""):
        self.message = f"stopped by {signal.Signals(number).name}{what_is_kept}"
        super().__init__(128 + number)


def stop_on_signals() -> None:
    """Raise Stopped at SIGTERM or SIGHUP and KeyboardInterrupt at SIGINT, in the main thread and once."""

    def stop(number: int, frame: object) -> None:
        _ignore()
        raise Stopped(number)

    def interrupt(number: int, frame: object) -> None:
        _ignore()
        raise KeyboardInterrupt

    _handle(stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


def _ignore() -> None:
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def _handle(handler: Callable[[int, object], None]) -> dict[signal.Signals, Any]:
    """Install a handler and return those before; a signal that is ignored, as under nohup, stays so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


@contextmanager
def held_back() -> Iterator[Callable[[], int]]:
    """Let SIGTERM and SIGHUP only set what the yielded function returns: the signal's number, 0 before one came."""
    came = [0]

    def note(number: int, frame: object) -> None:
        came[0] = number

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = _handle(note)
    try:
        yield lambda: came[0]
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
