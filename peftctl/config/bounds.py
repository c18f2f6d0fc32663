"""Work on what a stranger wrote, bounded in time and memory."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

if sys.platform == "linux":
    import resource


class TooMuch(Exception):
    """It took longer, or more memory, than anything sensible takes."""


class bounded:
    """Raise TooMuch inside where it takes more CPU time than `seconds`, or `megabytes` more memory than there are now.

    What is bounded is Python's own work, regular expressions among it. Time is bounded in the main thread alone, where
    signals arrive, and memory on Linux alone. It is entered for every row, so it is made of few calls.
    """

    def __init__(self, seconds: float, megabytes: int) -> None:
        self.seconds, self.megabytes = seconds, megabytes

    def __enter__(self) -> Self:
        self._timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        self._limits = _hold(self.megabytes)
        if self._timed:
            self._before = signal.signal(signal.SIGVTALRM, self._over)
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds, 0.1)  # again and again: one may be swallowed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, self._before)
        finally:
            if self._limits is not None:
                resource.setrlimit(resource.RLIMIT_AS, self._limits)
        if isinstance(error, MemoryError):
            raise TooMuch(f"it takes more than {self.megabytes} MB") from None

    def _over(self, number: int, frame: FrameType | None) -> None:
        raise TooMuch(f"it takes more than {self.seconds:g} s")


_seen: tuple[float, int] = (-1.0, 0)
"""When the size of this process was looked at last, and what it was in bytes."""


def _hold(megabytes: int) -> tuple[int, int] | None:
    """Let this process grow by so much; what its limits were before."""
    global _seen
    if sys.platform != "linux":
        return None
    now = time.monotonic()
    if now - _seen[0] > 1:  # it grows slowly, and a look takes longer than all the rest
        with open("/proc/self/statm", "rb", buffering=0) as file:
            _seen = now, int(file.read(100).split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _seen[1] + (megabytes << 20)
    limits = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    return soft, hard


@contextmanager
def no_panic() -> Iterator[None]:
    """What panics in a library written in Rust, which is no Exception in Python, raises RuntimeError inside."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error).strip() or "it panicked") from None
