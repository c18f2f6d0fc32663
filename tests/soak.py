"""Hours of faults, and the figures: `python -m soak [SECTION ...]` from `tests`; all sections when left out.

    kills        the real command killed at random moments, and gone on with
    power        losses of power, from the record of the writer's calls
    damage       damaged checkpoints
    calls        every call of the writer killed, for every method
    resume       every step, kind of rows and method
    fuzz         mutants of everything that is read
    rows         a million rows

Each writes its line to runs/soak; with `--report`, or `report` as a section, they become
benchmarks/results/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINES = ROOT / "runs" / "soak"
RESULTS = ROOT / "benchmarks" / "results" / "reliability.md"

FUZZ = {
    "adapter": 1_000_000,
    "recipe": 100_000,
    "data": 100_000,
    "gguf": 100_000,
    "checkpoint": 50_000,
    "chat": 20_000,
    "override": 50_000,
    "parquet": 50_000,
    "words": 2_000,
}
"""Cases of each target."""


def kills(place: Path, scale: float) -> str:
    from peftctl.verbs.selftest import selftest

    found = selftest(round(1000 * scale), folder=place)
    return (
        f"{found['kills']:,} kills at random moments: {found['lost']} committed checkpoints lost, {found['damaged']} "
        f"damaged, {found['exact']} of {found['runs']} adapters bit for bit, {found['most_steps_lost']} steps lost at "
        f"most with a checkpoint every {found['save_every']} (seed {found['seed']})"
    )


def power(place: Path, scale: float) -> str:
    from writer_checks import power_losses

    cases, seed = round(200_000 * scale), int(time.time())
    return f"{cases:,} losses of power: {len(list(power_losses(place / 'power', cases, seed)))} bad (seed {seed})"


def damage(place: Path, scale: float) -> str:
    from writer_checks import corruptions

    cases, seed = round(100_000 * scale), int(time.time())
    bad = len(list(corruptions(place / "damage", cases, seed)))
    return f"{cases:,} damaged checkpoints: {bad} taken, or not fallen back from (seed {seed})"


def calls(place: Path, scale: float) -> str:
    from training.test_every_call import killed
    from training.test_resume_matrix import LLAMAS

    bad = [failure for method in LLAMAS for failure in killed(method, place / method, round(1 / scale))]
    return f"every call of the writer killed, {len(LLAMAS)} methods: {len(bad)} runs that did not end as they should"


def resume(place: Path, scale: float) -> str:
    from training.test_resume_matrix import CASES, KINDS, STEPS, Trial

    bad = {}
    for method, kind in CASES:
        (place / method / kind).mkdir(parents=True)
        bad[method, kind] = Trial(method, KINDS[kind], place / method / kind).inexact(range(1, STEPS + 1))
    return f"{len(CASES) * STEPS} resumes (steps, kinds of rows, methods): {sum(map(len, bad.values()))} inexact"


def fuzz(place: Path, scale: float, target: str) -> str:
    from fuzz.run import run
    from fuzz.targets import TARGETS

    seed, failures = int(time.time()) % 2**31, LINES / "failures" / target
    failures.mkdir(parents=True, exist_ok=True)
    found = run(TARGETS[target](place), round(FUZZ[target] * scale), seed, failures)
    return f"`{target}` fuzzed: {found} (seed {seed})"


ROWS = """
import json, sys
from pathlib import Path
import peftctl
from peftctl.models import tiny
from peftctl.models.architecture import architecture
place, number = Path(sys.argv[1]), int(sys.argv[2])
place.mkdir()
tiny.write(architecture("HuggingFaceTB/SmolLM2-135M-Instruct", None), place / "model", seed=0, layers=2, width=64)
with (place / "rows.jsonl").open("w") as file:
    for row in range(number):
        said = [{"role": "user", "content": f"What follows {row}?"}, {"role": "assistant", "content": f"{row + 1}."}]
        file.write(json.dumps({"messages": said}) + "\\n")
recipe = {
    "model": {"name_or_path": str(place / "model"), "device": "cpu", "dtype": "float32"},
    "method": {"type": "lora", "r": 4},
    "dataset": {"train": str(place / "rows.jsonl"), "max_length": 128},
    "trainer": {"steps": 10, "batch_size": 8},
    "output": "run",
}
print(peftctl.train(recipe, output=place / "run")["peak_memory"])
"""


def rows(place: Path, scale: float) -> str:
    def peak(number: int) -> int:
        words = [sys.executable, "-c", ROWS, str(place / str(number)), str(number)]
        done = subprocess.run(words, capture_output=True, check=True, text=True)
        return int(done.stdout.splitlines()[-1])

    many = round(1_000_000 * scale)
    more = (peak(many) - peak(1000)) / 2**20
    return f"{many:,} rows prepared and trained on take {more:.0f} MiB more than 1,000"


SECTIONS: dict[str, Callable[[Path, float], str]] = {
    "kills": kills,
    "power": power,
    "damage": damage,
    "calls": calls,
    "resume": resume,
    "rows": rows,
    **{f"fuzz-{name}": lambda place, scale, name=name: fuzz(place, scale, name) for name in FUZZ},  # type: ignore[misc]
}


def report() -> str:
    """The lines of all sections."""
    told = [json.loads((LINES / f"{name}.json").read_text()) for name in SECTIONS if (LINES / f"{name}.json").exists()]
    lines = [f"- {one['line']}. {one['minutes']:.0f} min, {one['day']}, commit {one['commit']}" for one in told]
    head = (
        "# What was survived\n\n`make soak`; [docs/reliability.md](../../docs/reliability.md) says what is promised.\n"
    )
    return "\n".join([head, f"{machine()}.", "", *lines]) + "\n"


def machine() -> str:
    from benchmarks.report import machine as told
    from benchmarks.turns import Plan

    return " ".join(told(Plan(rounds=1, timed=1, threads=1, tune=False, environments=())))


def commit() -> str:
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--report", action="store_true", help="write the results file")
    given = parser.parse_args()
    os.environ["PEFTCTL_NO_CACHE"] = "1"
    LINES.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in SECTIONS if not given.sections or {name, name.split("-")[0]} & {*given.sections}]
    for name in wanted:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="peftctl-soak-") as place:
            line: dict[str, Any] = {"line": SECTIONS[name](Path(place), given.scale)}
        line |= {"minutes": (time.perf_counter() - started) / 60, "day": time.strftime("%Y-%m-%d"), "commit": commit()}
        (LINES / f"{name}.json").write_text(json.dumps(line))
        print(line["line"], flush=True)
    if given.report or "report" in given.sections:
        RESULTS.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
