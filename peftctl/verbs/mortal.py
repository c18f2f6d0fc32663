"""A process that may be killed at any moment: a fork of this one, so that it need not import anything."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

TICK = 0.002
"""Seconds between two looks at whether it still lives."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread here, and in forks from here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def live(work: Callable[[], object], log: Path, seconds: float | None = None) -> int | None:
    """Do `work` in a child and return its exit code; None when it was killed after `seconds`.

    What it prints, and the traceback that ends it with 1, go to `log`. Whatever this process has computed before must
    have been `one_thread`: a fork has only one, and would wait for the others.
    """
    child = os.fork()
    if child == 0:
        _do(work, log)
    until = time.monotonic() + seconds if seconds is not None else float("inf")
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(TICK)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code


def _do(work: Callable[[], object], log: Path) -> None:
    """Does it and ends the process, whatever happens."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
