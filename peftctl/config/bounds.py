"""Work on what a stranger wrote, bounded in time and memory."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooMuch(Exception):
    """It took longer, or more memory, than anything sensible takes."""


@contextmanager
def bounded(seconds: float, megabytes: int | None = None) -> Iterator[None]:
    """Raise TooMuch inside where it takes more CPU time than `seconds`, or `megabytes` more memory than there are now.

    What is bounded is Python's own work, regular expressions among it. Time is bounded in the main thread alone, where
    signals arrive, and memory on Linux alone.
    """
    try:
        with _time(seconds), _memory(megabytes):
            yield
    except MemoryError:
        raise TooMuch(f"it takes more than {megabytes} MB") from None


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TooMuch(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, over)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again: a library may swallow the first
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory(megabytes: int | None) -> Iterator[None]:
    if megabytes is None or sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as file:
        now = int(file.read(100).split()[0]) * resource.getpagesize()
    wanted = now + (megabytes << 20)
    limits = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def no_panic() -> Iterator[None]:
    """What panics in a library written in Rust, which is no Exception in Python, raises RuntimeError inside."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error).strip() or "it panicked") from None
