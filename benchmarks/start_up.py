"""Section e: how long users wait for help, for imports and the first step; what a step costs beside its work."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks import prepare
from benchmarks.job import Job
from benchmarks.report import spread
from benchmarks.side_by_side import ours, peers
from benchmarks.turns import ROOT, Plan, measure

COMMANDS = {
    "`peftctl --help`": ["-m", "peftctl", "--help"],
    "`trl --help`": ["-c", "from trl.cli import main; main()", "--help"],
    "`import peftctl`": ["-c", "import peftctl"],
    "`import peftctl; peftctl.train`": ["-c", "import peftctl; peftctl.train"],
    "`import torch`": ["-c", "import torch"],
    "`from peft import get_peft_model`": ["-c", "from peft import get_peft_model"],
    "`from trl import SFTTrainer`": ["-c", "from trl import SFTTrainer"],
}


def start_up(plan: Plan) -> list[str]:
    """e: commands, then the first step and the time between steps on a model that computes next to nothing."""
    lines = ["| command | seconds |", "|---|---|"]
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    failed: dict[str, str] = {}
    for number in range(plan.rounds + 1):  # the first fills caches of files and bytecode
        for name, words in COMMANDS.items():
            if name in failed:
                continue
            started = time.perf_counter()
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                failed[name] = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:120]
            elif number:
                taken[name].append(time.perf_counter() - started)
    for name, seconds in taken.items():
        lines.append(f"| {name} | {'did not run: ' + failed[name] if name in failed else spread(seconds, 2)} |")
    model, recipe = prepare.tiny(), prepare.fixed(16)
    rows = prepare.rows("fixed-16", recipe, model, 1)
    start = prepare.start("tiny", prepare.PEFT_LORA, model)
    job = Job(model=model, rows=rows, recipe=recipe, start=start, batch=1, micro=1, steps=60)
    quick = Plan(
        rounds=plan.rounds, warm=10, timed=50 if plan.timed > 1 else 20, threads=plan.threads, environments=("stock",)
    )
    found = measure([*ours(job), *peers(job, ())], quick, "stock")
    lines += [
        "",
        f"A Llama of one layer of width 64, 1 x 16 tokens a step, {quick.timed} steps a process after {quick.warm}: "
        "what a step costs beside its work. The first step counts from the start of the process: imports, loading, "
        "tokenising in peftctl alone (the peers read ids), compiling where something is compiled.",
        "",
        "| arm | ms a step | seconds to the end of the first step |",
        "|---|---|---|",
    ]
    for one in found:
        if not one.rounds:
            lines.append(f"| {one.arm.name} | did not run: {one.error} | |")
            continue
        each = [1000 * seconds for outcome in one.rounds for seconds in outcome["seconds"][quick.warm :]]
        first = [outcome["first"] for outcome in one.rounds]
        middle = sorted(each)
        low, high = (middle[int(len(middle) * share)] for share in (0.1, 0.9))
        took = f"{statistics.median(each):.1f} (80 % of them {low:.1f} to {high:.1f})"
        lines.append(f"| {one.arm.name} | {took} | {spread(first, 1)} |")
    return [*lines, ""]
