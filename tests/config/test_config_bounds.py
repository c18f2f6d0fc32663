"""Work on what strangers wrote ends in time and in memory, and leaves the process as it was."""

from __future__ import annotations

import re
import resource
import signal
import sys
import threading

import pytest

from peftctl.config.bounds import TooMuch, bounded, no_panic

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux alone")


def settings() -> tuple[object, ...]:
    timer = signal.getitimer(signal.ITIMER_VIRTUAL)
    return resource.getrlimit(resource.RLIMIT_AS), timer, signal.getsignal(signal.SIGVTALRM)


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize("work", [endless, lambda: re.match("(a+)+$", "a" * 60 + "!"), lambda: 9 ** (9**9)])
def test_what_never_ends_is_ended(work):
    before = settings()
    with pytest.raises(TooMuch, match=r"it takes more than 0\.1 s"), bounded(0.1, 512):
        work()
    assert settings() == before


@linux
def test_what_takes_all_memory_is_ended():
    before = settings()
    with pytest.raises(TooMuch, match="it takes more than 64 MB"), bounded(1.0, 64):
        bytearray(1 << 40)
    assert settings() == before


def test_other_errors_pass_and_leave_nothing():
    before = settings()
    with pytest.raises(ZeroDivisionError), bounded(1.0, 64):
        raise ZeroDivisionError
    with bounded(1.0, 64):
        assert settings() != before
    assert settings() == before


def test_in_a_thread_no_signal_is_asked_for():
    before, seen = settings(), []

    def work() -> None:
        with bounded(1.0, 64):
            seen.append(settings()[1:])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before[1:]]
    assert settings() == before


def test_a_panic_is_an_error():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(RuntimeError, match="regex over"), no_panic():
        raise panic("regex over")
    with pytest.raises(KeyboardInterrupt), no_panic():
        raise KeyboardInterrupt
