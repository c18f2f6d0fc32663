"""Ctrl-C, `kill` and a scheduler's warning: asked once, the run saves and stops; asked twice, it leaves at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_ECHO = 1.0
"""Seconds in which a signal of the other kind is the same request: on Ctrl-C, `torchrun` sends SIGTERM after it."""


class Stop:
    """Whether somebody asked this process to stop; poll `requested` wherever stopping is safe.

    The first signal only sets the flag. A second SIGINT or SIGTERM ends the process with 130 or 143 and no clean-up,
    which loses nothing, since whatever is finished came into place by a rename. SIGUSR1 is an early warning
    (Slurm's `--signal`): it asks, but does not count. In a thread other than the main one this does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that asked first, such as `SIGTERM`."""
        self._first: tuple[int, float] | None = None
        self._leaving: int | None = None
        self._deferred = 0
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Holds back even the second signal until the block ends: for a commit and its bookkeeping, kept short."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
            if self._leaving is not None and not self._deferred:
                _leave(self._leaving)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: asking is its parent's business, SIGTERM ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.requested = self.requested or signal.Signals(number).name
        if number not in (signal.SIGINT, signal.SIGTERM):
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (number, now)
        elif number == self._first[0] or now - self._first[1] > _ECHO:
            self._leaving = number
            if not self._deferred:
                _leave(number)


def _leave(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os._exit(128 + number)
