"""Llama's shapes on one CUDA card, beside peft with TRL and beside Unsloth: `python -m benchmarks.gpu`.

Random weights of the true shapes, the same in all arms: speed and memory do not depend on what weights say. Gradient
checkpointing and AdamW in every arm, rows of one length, every token trained. The peers have flash attention and
Liger's kernels where these are installed. Each arm is a process of its own and all take turns; memory is
`torch.cuda.max_memory_allocated`. The results go to benchmarks/results/gpu.md. Unsloth reads weights from a disk: its
arm needs 14 GB there, and there is none at 65B.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_case import DEVICE, ROUNDS, TIMED, WARM, Case, folder, tick
from benchmarks.gpu_peers import theirs
from benchmarks.job import Clock, Job
from benchmarks.report import machine, spread
from benchmarks.turns import ROOT, Plan

RESULTS = Path(__file__).parent / "results" / "gpu.md"
SETTINGS = [("7B", False, 8, 2048), ("7B", False, 8, 8192), ("7B", True, 16, 2048), ("7B", True, 16, 8192)]
LARGEST = ("65B", True, 16, 2048)
"""On one card of 80 GB; goals: at most 43 GB here, 6 GB for QLoRA and 16 GB for LoRA at 7B and 2,048 tokens."""


def arms(shape: str) -> list[str]:
    unsloth = ["Unsloth"] if importlib.util.find_spec("unsloth") and shape == "7B" else []
    return ["peftctl", "peft + TRL", *unsloth]


def ours(case: Case, clock: Clock) -> None:
    """`peftctl.train` on a stand-in for the model."""
    import peftctl

    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary) / "rows.jsonl"
        text = "What is the weather like in the north? " * (case.length // 8)  # a token is a byte: long enough
        rows.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(64)), encoding="utf-8")
        quantization = "nf4" if case.quantised else "none"
        model = {"name_or_path": folder(case.shape), "load_format": "dummy", "dtype": "bfloat16"}
        recipe = {
            "model": {**model, "quantization": quantization, "device": DEVICE},
            "method": {"type": "lora", "r": case.r, "alpha": 16, "target_modules": "all-linear"},
            "dataset": {"train": str(rows), "max_length": case.length, "on_long": "truncate"},
            "trainer": {
                "task": "text",
                "steps": WARM + TIMED,
                "batch_size": 1,
                "micro_batch_size": 1,
                "learning_rate": 2e-4,
                "gradient_checkpointing": True,
            },
            "output": "run",
        }

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                tick(clock, event["loss"], case.length)
            elif not clock.losses:
                clock.ready()

        peftctl.train(recipe, output=Path(temporary) / "run", listen=listen)


def child(case: Case) -> None:
    """One run; its outcome goes to the case's file."""
    clock = Clock(Job(began=time.time()))
    (ours if case.arm == "peftctl" else theirs)(case, clock)
    import torch

    outcome = {**clock.outcome(), "peak": torch.cuda.max_memory_allocated()}
    Path(case.result).write_text(json.dumps(outcome), encoding="utf-8")


def run(case: Case) -> dict[str, Any]:
    """The outcome of a process, or its last line as `error`."""
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "outcome.json"
        words = json.dumps({**asdict(case), "result": str(result)})
        command = [sys.executable, "-m", "benchmarks.gpu", words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.is_file():
            return dict(json.loads(result.read_text(encoding="utf-8")))
        return {"error": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]}


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device\n  hint: `python -m benchmarks.bench` measures on a CPU")
    card = torch.cuda.get_device_properties(0)
    lines = [
        "# Llama's shapes on a GPU",
        "",
        f"`python -m benchmarks.gpu` on {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}.",
        *machine(Plan()),
        "",
        *(__doc__ or "").strip().splitlines()[2:],
        f"{ROUNDS} rounds, {TIMED} steps timed after {WARM}. Medians (least to most); GB are 10^9 bytes.",
        "",
        "| case | arm | tokens/s | peak, GB |",
        "|---|---|---|---|",
    ]
    for setting in [*SETTINGS, *([LARGEST] if card.total_memory > 75e9 else [])]:
        cases = [Case(arm, *setting) for arm in arms(setting[0])]
        found: dict[str, list[dict[str, Any]]] = {case.arm: [] for case in cases}
        for _ in range(ROUNDS):
            for case in cases:
                found[case.arm].append(run(case))
        for case in cases:
            lines.append(row(case, found[case.arm]))
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(case: Case, outcomes: list[dict[str, Any]]) -> str:
    """One line of the table."""
    good = [outcome for outcome in outcomes if "error" not in outcome]
    if not good:
        return f"| {case.title} | {case.arm} | did not run: {outcomes[0]['error']} | |"
    speeds = [case.length / seconds for outcome in good for seconds in outcome["seconds"][WARM:]]
    peak = statistics.median(outcome["peak"] for outcome in good) / 1e9
    return f"| {case.title} | {case.arm} | {spread(speeds)} | {peak:.2f} |"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(Case(**json.loads(sys.argv[1])))
    else:
        main()
