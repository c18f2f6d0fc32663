"""peftctl and its peers side by side on a CPU: `python -m benchmarks.bench`, or some of its sections, `... a c`.

    a   fixed rows, 4 x 512 tokens           results/peers-fixed.md
    b   tweets, all tokens and answers       results/peers-tweets.md
    c   every method, beside peft's own      results/peers-methods.md
    d   a base in 4 bits                     results/peers-nf4.md
    e   start-up and overhead per step       results/peers-start.md

All of it takes two to three hours on two cores, which should be idle. `--quick` is one round of two steps, to see that
everything runs; it writes to runs/bench, because such figures say nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import every_method, side_by_side, start_up
from benchmarks.report import Load, machine
from benchmarks.turns import ROOT, STOCK, TCMALLOC, Plan, tcmalloc

RESULTS = Path(__file__).parent / "results"


class Section(NamedTuple):
    """A results file and what fills it."""

    file: str
    title: str
    run: Callable[[Plan], list[str]]


SECTIONS = {
    "a": Section("peers-fixed.md", "Fixed rows beside the peers", side_by_side.fixed),
    "b": Section("peers-tweets.md", "Tweets beside the peers", side_by_side.tweets),
    "c": Section("peers-methods.md", "Every method beside peft's own", every_method.methods),
    "d": Section("peers-nf4.md", "A base in 4 bits beside the peers", side_by_side.nf4),
    "e": Section("peers-start.md", "Start-up and overhead beside the peers", start_up.start_up),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="a to e; all when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of every process, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--environment", choices=[STOCK, TCMALLOC], help="one allocator alone")
    parser.add_argument("--quick", action="store_true", help="see that everything runs")
    parser.add_argument("--output", type=Path, help="another folder for the results")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        sys.exit(f"error: no section {', '.join(sorted(unknown))}\n  hint: one or more of {', '.join(SECTIONS)}")
    plan = Plan(
        rounds=1 if given.quick else given.rounds,
        timed=1 if given.quick else given.steps,
        threads=given.threads,
        tune=not given.quick,
        environments=environments(given.environment),
    )
    folder = given.output or (ROOT / "runs" / "bench" if given.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    for name in given.sections or list(SECTIONS):
        section = SECTIONS[name]
        before = Load.now()
        lines = section.run(plan)
        text = "\n".join(head(name, section, plan, before.told(Load.now()), given.quick) + lines)
        (folder / section.file).write_text(text.rstrip() + "\n", encoding="utf-8")
        print(folder / section.file, flush=True)


def environments(wanted: str | None) -> tuple[str, ...]:
    """Those asked for, without tcmalloc where there is none."""
    have = (STOCK, TCMALLOC) if tcmalloc() else (STOCK,)
    if wanted and wanted not in have:
        sys.exit("error: tcmalloc was not found\n  hint: `apt-get install libtcmalloc-minimal4`")
    return (wanted,) if wanted else have


def head(name: str, section: Section, plan: Plan, load: str, quick: bool) -> list[str]:
    """Title, how it was measured, versions and hardware."""
    lines = [
        f"# {section.title}",
        "",
        f"`python -m benchmarks.bench {name}`. SmolLM2-135M-Instruct in bfloat16; LoRA r=8, alpha 16, no dropout, on "
        "all linears unless said otherwise; AdamW at 2e-4, constant, gradients clipped at 1. All arms start from one "
        "adapter that peft made and read the same rows in the same order; peftctl runs as `peftctl.train` with a "
        f"recipe. Every arm is a process of its own, {plan.rounds} rounds in turn, {plan.timed} steps a round timed "
        f"after {plan.warm} that is not; a step lasts from the end of the one before. Speeds are medians over all "
        "timed steps (least to most), ratios those of whole rounds, peaks VmHWM, medians over rounds. The allocator is "
        "glibc's as it is (stock; peftctl sets its own mallopt there, as it does for users), or tcmalloc under both.",
        "",
        *machine(plan),
        f"Load: {load}.",
        "",
    ]
    if quick:
        lines[2:2] = ["**A quick run to see that everything works: its figures say nothing.**", ""]
    return lines


if __name__ == "__main__":
    main()
