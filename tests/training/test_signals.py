from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import peftctl
from peftctl.training.signals import Stop

SCRIPT = """
import sys, time
from peftctl.training import signals
from peftctl.training.signals import Stop
signals._ECHO = float(sys.argv[2])
with Stop() as stop:
    print("ready", flush=True)
    said = None
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if sys.argv[1] == "busy":
            time.sleep(0.005)
        if stop.requested and not said:
            said = stop.requested
            print(said, flush=True)
            if sys.argv[1] == "polite":
                sys.exit(75)
            if sys.argv[1] == "commit":
                with stop.deferred():
                    with stop.deferred():
                        time.sleep(0.3)
                    print("committed", flush=True)
                print("not reached after a second signal", flush=True)
"""


class Child:
    """A process that polls; `say` reads its next line, `end` its exit code."""

    def __init__(self, mode: str, echo: float = 0.0) -> None:
        path = {**os.environ, "PYTHONPATH": str(Path(peftctl.__file__).parents[1])}
        self.process = subprocess.Popen([sys.executable, "-c", SCRIPT, mode, str(echo)], stdout=-1, text=True, env=path)
        assert self.say() == "ready"

    def say(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(10)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_first_signal_only_asks(name: str) -> None:
    child = Child("polite")
    child.tell(signal.Signals[name])
    assert child.say() == name
    assert child.end() == 75


@pytest.mark.parametrize(
    ("first", "second", "code"), [("INT", "INT", 130), ("TERM", "TERM", 143), ("INT", "TERM", 143)]
)
def test_the_second_leaves_at_once(first: str, second: str, code: int) -> None:
    child = Child("busy")
    child.tell(signal.Signals["SIG" + first])
    assert child.say() == "SIG" + first
    child.tell(signal.Signals["SIG" + second])
    assert child.end() == code


def test_an_early_warning_does_not_count() -> None:
    child = Child("busy")
    child.tell(signal.SIGUSR1)
    assert child.say() == "SIGUSR1"
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        child.tell(number)
        time.sleep(0.05)
    assert child.process.poll() is None
    child.tell(signal.SIGTERM)
    assert child.end() == 143


def test_the_launchers_echo_is_no_second_signal() -> None:
    child = Child("busy", echo=0.5)
    child.tell(signal.SIGINT)
    assert child.say() == "SIGINT"
    child.tell(signal.SIGTERM)
    time.sleep(0.6)
    assert child.process.poll() is None
    child.tell(signal.SIGTERM)
    assert child.end() == 143


def test_even_the_second_waits_for_a_commit() -> None:
    child = Child("commit")
    child.tell(signal.SIGTERM)
    assert child.say() == "SIGTERM"
    time.sleep(0.05)
    child.tell(signal.SIGTERM)
    assert child.say() == "committed"
    assert child.end() == 143
    assert child.say() == ""


@pytest.fixture
def handlers() -> Iterator[list[object]]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield before
    assert [signal.getsignal(number) for number in numbers] == before


def test_handlers_are_given_back(handlers: list[object]) -> None:
    stop = Stop()
    with suppress(KeyError), stop:
        signal.raise_signal(signal.SIGTERM)
        raise KeyError
    assert stop.requested == "SIGTERM"
    with Stop() as again:
        assert again.requested is None


def test_in_a_thread_it_is_inert(handlers: list[object]) -> None:
    seen = []

    def work() -> None:
        with Stop() as stop, stop.deferred():
            seen.append((stop.requested, [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, handlers[:2])]


def test_a_forked_worker_ignores_ctrl_c_and_dies_of_sigterm(handlers: list[object]) -> None:
    with Stop() as stop:
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(9)
        _, status = os.waitpid(worker, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert stop.requested is None
