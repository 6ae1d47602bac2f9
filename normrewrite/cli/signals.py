"""Signals that end a command as Ctrl-C does: by an exception, so that temporary files are cleared away.

>>> with as_exceptions():
...     app()
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What docker, Slurm, a lost terminal, Ctrl-\\ and a limit on the time of a process send.
_NAMES = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU")

_AGAIN = 0.01  # seconds until a signal that was raised where nobody hears it is sent again
_GRACE = 5.0  # seconds to clear away in: torchrun, and a terminal that is closed, send the same signal twice


class Terminated(KeyboardInterrupt):
    """Raised where the command is, by one of these signals."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Inside, each of these signals raises Terminated, and Ctrl-C KeyboardInterrupt. One that is ignored (nohup) or handled
    already stays so.

    An error after one of them is its consequence, as where a library was broken off in the middle of an import. Of several
    processes of one training only the first writes files that would be left; the others end at once, as a process that waits
    for a lost one could not look at its signals.
    """
    taken: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread() and os.environ.get("RANK", "0") == "0":
        numbers = [getattr(signal, name) for name in ("SIGINT", *_NAMES) if hasattr(signal, name)]
        handlers = {number: signal.getsignal(number) for number in numbers}
        taken = {number: now for number, now in handlers.items() if now in (signal.SIG_DFL, signal.default_int_handler)}
    owner, ended, stopped = os.getpid(), -math.inf, None

    def end(number: int, _frame: Any) -> None:
        nonlocal ended, stopped
        if os.getpid() != owner:  # a forked one has files of its own, if any
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # A second one is let pass, but not for good: the exception may have been lost in somebody's `except`.
        if number == signal.SIGINT or time.monotonic() - ended > _GRACE:
            ended = time.monotonic()
            stopped = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
            raise stopped

    def unheard(lost: Any) -> None:
        """What is raised in a finaliser or a weak reference's callback, Python only prints: send the signal again."""
        nonlocal ended
        if stopped is None or lost.exc_value is not stopped:
            report(lost)
            return
        ended = -math.inf
        again = threading.Timer(_AGAIN, os.kill, (owner, getattr(stopped, "number", signal.SIGINT)))
        again.daemon = True
        again.start()

    for number in taken:
        signal.signal(number, end)
    report, sys.unraisablehook = sys.unraisablehook, unheard
    try:
        yield
    except Exception:
        if stopped is not None:
            raise stopped from None
        raise
    finally:
        sys.unraisablehook = report
        for number, before in taken.items():
            signal.signal(number, before)


def outcome(error: BaseException) -> tuple[str, int]:
    """What is said of a command that was broken off, and its exit code: 128 and the signal's number."""
    number = error.number if isinstance(error, Terminated) else int(signal.SIGINT)
    word = f"terminated by {signal.Signals(number).name}" if isinstance(error, Terminated) else "interrupted"
    return ": ".join(filter(None, (word, str(error)))), 128 + number
