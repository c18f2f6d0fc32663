"""Many mutants through one target: `python -m fuzz.run TARGET --cases N --seed S --failures FOLDER`, from `tests`.

Case number n of a seed is always the same. What fails is written to the folder, a folder of its own for each; a process
that dies leaves there, in `at`, the number of a case up to 63 before the one that killed it.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutations import Case
from fuzz.target import Target, told
from fuzz.targets import TARGETS

from peftctl.errors import PeftctlError

GROWTH = 256
"""Megabytes that the memory of the process may grow by."""

DEAD = 120
"""Seconds for 64 cases after which a process that no signal reaches ends itself, when failures are kept."""


class Hang(BaseException):
    """A case has used up its time. No Exception, so that nobody takes it for one of their own."""


@dataclass
class Result:
    """What came of a run."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    failures: list[str] = field(default_factory=list)
    """What went wrong, a text for each case."""
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)
    """Seconds of CPU time and number of the case that took longest."""
    growth: float = 0.0
    """Megabytes that the process grew by from the first tenth of the cases to the last."""

    def __str__(self) -> str:
        took, number = self.slowest
        rate = self.cases / max(self.seconds, 1e-9)
        return (
            f"{self.cases:,} cases, {self.refused:,} refused, {self.accepted:,} accepted, {len(self.failures)} failed;"
            f" {self.seconds:.1f} s, {rate:,.0f}/s; slowest {took * 1000:.0f} ms (case {number}); {self.growth:+.1f} MB"
        )


def run(
    target: Target, cases: int, seed: int, failures: Path | None = None, start: int = 0, give_up: int = 20
) -> Result:
    """Feed `cases` mutants to `target`, from number `start` on; what fails is saved below `failures`.

    Ends early after `give_up` failures.
    """
    result, begun = Result(), time.perf_counter()
    for case in target.mutator.corpus:  # what is imported or remembered once is nobody's growth
        with_verdict(target, case)
    forget_peak()
    early = memory()
    for number in range(start, start + cases):
        if failures and number % 64 == 0:
            (failures / "at").write_text(str(number))
            faulthandler.dump_traceback_later(DEAD, exit=True)
        case = target.mutator.case(Random(seed << 40 | number))
        taken, wrong, seconds = with_verdict(target, case)
        result.cases += 1
        result.refused += not taken and wrong is None
        result.accepted += taken
        result.slowest = max(result.slowest, (seconds, number))
        if wrong is not None:
            result.failures.append(f"case {number}: {wrong}")
            if failures:
                keep(failures / f"{seed}-{number}", case, wrong)
            if len(result.failures) >= give_up:
                break
        if number == start + cases // 10:
            early = memory()
    faulthandler.cancel_dump_traceback_later()
    result.seconds, result.growth = time.perf_counter() - begun, memory() - early
    return result


def with_verdict(target: Target, case: Case) -> tuple[bool, str | None, float]:
    """Whether a case is taken, what is wrong with how it was read, and its CPU time in seconds."""
    wrong, taken, high = None, False, peak()
    begun = time.process_time()
    try:
        with limited(target.seconds):
            try:
                target.check(case)
                taken = True
            except PeftctlError as error:
                told(error)
    except Hang:
        wrong = f"more than {target.seconds:g} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong = "".join(traceback.format_exception(error, limit=-12))[-3_000:]
    seconds = time.process_time() - begun
    if peak() > high + GROWTH:
        wrong = wrong or f"{peak() - high:.0f} MB more"
        forget_peak()
    return taken and wrong is None, wrong, seconds


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang inside after so much CPU time."""

    def over(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)  # again and again: the first may end in a clause for everything
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def memory() -> float:
    """Megabytes of memory that the process has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """Megabytes of memory that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def forget_peak() -> None:
    """Measure the peak from now on."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def keep(folder: Path, case: Case, wrong: str) -> None:
    """The files of a case, and beside them what they did."""
    for name, data in case.items():
        (folder / "case" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "case" / name).write_bytes(data)
    (folder / "why").write_text(wrong, encoding="utf-8", errors="backslashreplace")


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.run")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=None)
    words = parser.parse_args()
    faulthandler.enable()
    if words.failures:
        words.failures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        result = run(TARGETS[words.target](Path(folder)), words.cases, words.seed, words.failures, words.start)
    for wrong in result.failures:
        print(wrong.encode("ascii", "backslashreplace").decode())
    print(f"{words.target}: {result}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
