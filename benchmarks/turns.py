"""Arms in turn: every arm is a process of its own, and all take turns in every round."""

from __future__ import annotations

import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.job import Job

ROOT = Path(__file__).parent.parent
STOCK, TCMALLOC = "stock", "tcmalloc"
LIBRARIES = ["/usr/lib/*/libtcmalloc_minimal.so.4", "/usr/lib*/libtcmalloc_minimal.so.4"]
LIMIT = 1800.0
"""Seconds after which a process has failed."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to do a job."""

    name: str
    job: Job
    choices: tuple[dict[str, Any], ...] = ()
    """Settings of the job tried beforehand, of which the fastest is measured."""
    environment: dict[str, str] = field(default_factory=dict)
    same_rows: bool = True
    """Whether its losses belong to the same rows in the same order."""


@dataclass
class Measured:
    """What an arm came to in one environment."""

    arm: Arm
    chosen: dict[str, Any] = field(default_factory=dict)
    tried: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    """Tokens a second of every choice, by one short run each."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often and how long."""

    rounds: int = 3
    warm: int = 1
    """Steps of every process that are not timed."""
    timed: int = 2
    threads: int = 2
    tune: bool = True
    environments: tuple[str, ...] = (STOCK, TCMALLOC)

    @property
    def steps(self) -> int:
        return self.warm + self.timed


def tcmalloc() -> str | None:
    """The library, where Debian and its kin keep it (package libtcmalloc-minimal4)."""
    found = sorted(path for pattern in LIBRARIES for path in glob.glob(pattern))
    return found[0] if found else None


def measure(arms: list[Arm], plan: Plan, environment: str) -> list[Measured]:
    """Every arm in every round; the order rotates, so that no arm always follows the same one."""
    found = [Measured(arm, dict(arm.choices[0]) if arm.choices else {}) for arm in arms]
    if plan.tune:
        for one in found:
            choose(one, plan, environment)
    for number in range(plan.rounds):
        at = number % len(found)
        for one in found[at:] + found[:at]:
            if not one.error:
                outcome = run(one.arm, one.chosen, plan, environment)
                one.error = outcome.get("error", "")
                if not one.error:
                    one.rounds.append(outcome)
                    told = f"{speed(outcome, plan.warm):.0f} tokens/s, {outcome['peak'] / 2**30:.2f} GiB"
                print(f"{environment} {number + 1}: {one.arm.name}: {one.error or told}", file=sys.stderr, flush=True)
    return found


def choose(one: Measured, plan: Plan, environment: str) -> None:
    """Try the choices of an arm, each once, and keep the fastest."""
    if len(one.arm.choices) < 2:
        return
    for choice in one.arm.choices:
        outcome = run(one.arm, choice, plan, environment)
        tokens = 0.0 if outcome.get("error") else speed(outcome, plan.warm)
        one.tried.append((choice, tokens))
        print(f"{environment} choice: {one.arm.name} {choice}: {tokens:.0f} tokens/s", file=sys.stderr, flush=True)
    one.chosen = max(one.tried, key=lambda pair: pair[1])[0]


def run(arm: Arm, choice: dict[str, Any], plan: Plan, environment: str) -> dict[str, Any]:
    """One process from start to end; `error` is its last line where it failed."""
    variables = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "OMP_NUM_THREADS")}
    variables |= {"OMP_NUM_THREADS": str(plan.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if environment == TCMALLOC:
        variables["LD_PRELOAD"] = tcmalloc() or ""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "outcome.json"
        job = replace(arm.job, **{"steps": plan.steps, **choice}, result=str(result), began=time.time())
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.arm"]
        options: dict[str, Any] = {"cwd": ROOT, "env": {**variables, **arm.environment}, "timeout": LIMIT}
        try:
            done = subprocess.run(command, input=job.to_json(), capture_output=True, text=True, **options)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {LIMIT:.0f} s"}
        if result.is_file():
            return dict(json.loads(result.read_text(encoding="utf-8")))
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"error": lines[-1][:300] if lines else f"ended with {done.returncode}"}


def speed(outcome: dict[str, Any], warm: int) -> float:
    """Tokens a second over all timed steps of one process."""
    tokens, seconds = sum(outcome["tokens"][warm:]), sum(outcome["seconds"][warm:])
    return float(tokens / seconds)


def speeds(one: Measured, warm: int) -> list[float]:
    """Tokens a second of every timed step of every round."""
    return [
        tokens / seconds
        for outcome in one.rounds
        for tokens, seconds in zip(outcome["tokens"][warm:], outcome["seconds"][warm:], strict=True)
    ]


def ratios(ours: Measured, other: Measured, warm: int) -> list[float]:
    """How many times as fast ours is, in every round that both finished."""
    return [speed(a, warm) / speed(b, warm) for a, b in zip(ours.rounds, other.rounds, strict=False)]


def peak(one: Measured, key: str = "peak") -> float:
    """Median over the rounds [bytes]."""
    return float(statistics.median(outcome[key] for outcome in one.rounds))
