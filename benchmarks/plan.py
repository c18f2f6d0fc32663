"""Predicted against measured peak memory: `python benchmarks/plan.py`, 15 to 30 minutes on two cores.

Every configuration is a real `peftctl train` in a process of its own, on random weights of the true shapes. The results
go to benchmarks/results/plan.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

RESULTS = Path(__file__).parent / "results" / "plan.md"
STEPS, RAGGED_STEPS = 3, 40
SMOLLM2, GPT2, T5, BERT, OPT = (
    "HuggingFaceTB/SmolLM2-135M",
    "gpt2",
    "t5-small",
    "bert-base-uncased",
    "facebook/opt-125m",
)
LONG = "What is the weather like in the north of the country, and what will it be like tomorrow? " * 60


class Case(NamedTuple):
    """One configuration: what is said here, defaults otherwise."""

    model: str
    method: dict[str, Any]
    rows: int
    """Of a micro-batch."""
    length: int
    """Tokens of a row."""
    task: str = "text"
    trainer: Mapping[str, Any] = MappingProxyType({})
    dtype: str = "bfloat16"
    quantization: str = "none"
    ragged: bool = False
    """Rows of all lengths up to `length`, and steps enough for most of what comes of that."""

    @property
    def steps(self) -> int:
        return RAGGED_STEPS if self.ragged else STEPS

    @property
    def name(self) -> str:
        kind = " ".join(f"{key} {value}" if key != "type" else str(value) for key, value in self.method.items())
        words = [self.model.rpartition("/")[2], kind, f"{self.rows} x {self.length}", self.dtype]
        words += [self.quantization] * (self.quantization != "none") + ["ragged"] * self.ragged
        words += [key if value is True else f"{key} {value}" for key, value in self.trainer.items()]
        return ", ".join(words)


LORA = {"type": "lora", "r": 8}
CASES = [
    Case(SMOLLM2, LORA, 4, 512),
    Case(SMOLLM2, {"type": "lora", "r": 64}, 2, 512),
    Case(SMOLLM2, LORA, 8, 128),
    Case(SMOLLM2, LORA, 2, 128, trainer={"batch_size": 8}),
    Case(SMOLLM2, LORA, 2, 1024, trainer={"gradient_checkpointing": True}),
    Case(SMOLLM2, {"type": "lora", "r": 16}, 2, 512, quantization="nf4"),
    Case(SMOLLM2, LORA, 2, 512, dtype="float32"),
    Case(SMOLLM2, {"type": "full"}, 2, 256),
    Case(SMOLLM2, {"type": "full"}, 2, 256, trainer={"optimizer": "adamw_8bit"}),
    Case(SMOLLM2, {"type": "dora", "r": 8}, 2, 256),
    Case(SMOLLM2, {"type": "ia3"}, 4, 256),
    Case(SMOLLM2, {"type": "prefix", "num_virtual_tokens": 16}, 2, 512),
    Case(GPT2, LORA, 4, 256),
    Case(GPT2, {"type": "full"}, 2, 512, dtype="float32"),
    Case(OPT, {"type": "bottleneck"}, 4, 256),
    Case(T5, LORA, 8, 256, task="seq2seq"),
    Case(BERT, LORA, 8, 256, task="classification"),
    Case(SMOLLM2, LORA, 16, 128, ragged=True),
    Case(GPT2, LORA, 4, 128, ragged=True),
    Case(BERT, LORA, 8, 128, task="classification", ragged=True),
]


def rows(case: Case, path: Path) -> None:
    """Rows that are all longer than a row may be, or of different lengths."""
    made, random = [], Random(0)
    for number in range(4 * case.steps * case.rows):
        words = LONG.split()
        text = f"{number} {' '.join(words[: random.randint(8, case.length)] if case.ragged else words)}"
        if case.task == "seq2seq":
            made.append({"source": text, "target": text})
        elif case.task == "classification":
            made.append({"text": text, "label": ["no", "yes"][number % 2]})
        else:
            made.append({"text": text})
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def recipe(case: Case, folder: Path) -> dict[str, Any]:
    """The recipe of a configuration."""
    dataset = {"train": str(folder / "rows.jsonl"), "max_length": case.length, "on_long": "truncate"}
    trainer = {"task": case.task, "steps": case.steps, "micro_batch_size": case.rows, "batch_size": case.rows}
    model = {"name_or_path": case.model, "load_format": "dummy", "dtype": case.dtype, "device": "cpu"}
    return {
        "model": {**model, "quantization": case.quantization},
        "method": case.method,
        "dataset": dataset,
        "trainer": {**trainer, **case.trainer},
        "output": "run",
    }


def run(case: Case, changes: list[str]) -> dict[str, Any]:
    """What `peftctl train --json` says of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows(case, folder / "rows.jsonl")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(case, folder)), encoding="utf-8")
        command = [sys.executable, "-m", "peftctl", "train", "recipe.yaml", "--json", *changes]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "CI": "1"})
        if done.returncode:
            raise SystemExit(f"{case.name}: {done.stderr[-2000:]}")
        return dict(json.loads(done.stdout))


def report(found: list[tuple[Case, dict[str, Any]]]) -> str:
    """The results as a page."""
    errors = [one["predicted_memory"] / one["peak_memory"] - 1 for _, one in found]
    lines = [
        "# Predicted and measured peak memory on a CPU",
        "",
        f"`python benchmarks/plan.py`: {STEPS} steps of `peftctl train` each, {RAGGED_STEPS} where rows are ragged, in "
        "a process of its own, on random weights of the true shapes. Resident memory at its peak, everything included. "
        f"{machine()}.",
        "",
        f"From {min(errors):+.1%} to {max(errors):+.1%} over {len(found)} configurations; wanted: within 15 %, and "
        "never more than 5 % under.",
        "",
        "| configuration | measured [GiB] | predicted [GiB] | error |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {case.name} | {one['peak_memory'] / 2**30:.2f} | {one['predicted_memory'] / 2**30:.2f} | {error:+.1%} |"
        for (case, one), error in zip(found, errors, strict=True)
    ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """What it was measured on."""
    import torch
    import transformers

    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return (
        f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}, {threads} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    chosen = [int(word) for word in sys.argv[1:] if word.isdigit()] or range(len(CASES))
    changed = [word for word in sys.argv[1:] if "=" in word]
    done = []
    for index in chosen:
        done.append((CASES[index], run(CASES[index], changed)))
        print(json.dumps({"case": index, "name": CASES[index].name, **done[-1][1]}), flush=True)
    if len(done) == len(CASES) and not changed:
        RESULTS.write_text(report(done), encoding="utf-8")
