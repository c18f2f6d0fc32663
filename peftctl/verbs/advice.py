"""Settings to begin with, from what is known before the first run. docs/tuning.md explains them.

The number of rows gives the range of the rank, the task a rank clipped into it; models above 10B parameters get twice
as much. Every setting comes with its reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from peftctl.errors import RecipeError

TaskName = Literal[
    "chat", "instruction", "text", "code", "classification", "translation", "summarisation", "preferences", "captioning"
]
Preset = Literal["conservative", "balanced", "aggressive"]
Reach = Literal["query and value", "attention", "all-linear"]

LARGE = 10_000_000_000
"""Parameters from which a model counts as large."""
SMALL = 1_000_000_000
"""Parameters below which it counts as small."""


class Task(NamedTuple):
    """What suits a task on a model of about 7B parameters."""

    r: int
    dropout: float
    reach: Reach
    why: str


TASKS: dict[TaskName, Task] = {
    "chat": Task(16, 0.05, "attention", "generation"),
    "instruction": Task(16, 0.05, "attention", "generation"),
    "text": Task(16, 0.05, "all-linear", "new knowledge sits in the feed-forward too"),
    "code": Task(32, 0.05, "all-linear", "code asks more of the model than chat"),
    "classification": Task(8, 0.1, "attention", "few outputs need few directions"),
    "translation": Task(32, 0.1, "all-linear", "two languages ask for more than one"),
    "summarisation": Task(16, 0.1, "attention", "generation, from long inputs"),
    "preferences": Task(16, 0.05, "attention", "generation"),
    "captioning": Task(16, 0.1, "attention", "short texts"),
}

RANKS = ((1_000, 4, 8), (10_000, 8, 16), (100_000, 16, 64), (math.inf, 64, 256))
"""Up to so many rows, the lowest and the highest rank that they can fill."""

PRESETS: dict[Preset, tuple[int, float]] = {"conservative": (8, 0.1), "aggressive": (64, 0.05)}
"""Rank and dropout, whatever rows and task; alpha is twice the rank."""

ALPHA = 2
"""alpha / r: the update is multiplied by it, and the usual learning rates are for this."""


class Setting(NamedTuple):
    """One value of a recipe, and why."""

    value: object
    why: str


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known before the first run."""

    task: TaskName
    rows: int | None = None
    """Training rows; None when the file is not there yet."""
    parameters: int | None = None
    """Of the base model; None when nothing tells."""
    query_and_value: list[str] | None = None
    """The names of those modules in this model; None when nothing tells, or both are in one."""
    preset: Preset = "balanced"
    trained_as: str | None = None
    """The recipe's task, where it is not supervised fine-tuning of a causal language model."""
    longest: int = 2048
    """Tokens of the longest row; encoders have positions for few, and the first of some belong to none."""

    @property
    def large(self) -> bool:
        return (self.parameters or 0) > LARGE

    @property
    def size(self) -> str:
        """How a person says it."""
        if self.parameters is None:
            return "a model of unknown size"
        billions = self.parameters / 1e9
        return f"{billions:.3g}B parameters" if billions >= 1 else f"{billions * 1000:.3g}M parameters"


def rank(known: Known) -> Setting:
    """`r`: the size of a low-rank adapter."""
    if known.preset != "balanced":
        return Setting(PRESETS[known.preset][0], f"the {known.preset} preset")
    task = TASKS[known.task]
    if known.rows is None:
        r, why = task.r, f"usual for {known.task} ({task.why})"
    else:
        low, high = next((low, high) for limit, low, high in RANKS if known.rows < limit)
        r = min(max(task.r, low), high)
        why = f"{known.rows:,} rows fill {low} to {high}; {known.task} usually takes {task.r}"
    return Setting(2 * r, f"{why}; doubled for {known.size}") if known.large else Setting(r, why)


def alpha(known: Known) -> Setting:
    """`alpha`: the update is multiplied by alpha / r."""
    return Setting(ALPHA * int(str(rank(known).value)), "twice the rank, which the usual learning rates expect")


def dropout(known: Known) -> Setting:
    """`dropout` of the adapter's inputs."""
    if known.preset != "balanced":
        return Setting(PRESETS[known.preset][1], f"the {known.preset} preset")
    if known.large:
        return Setting(0.05, f"0.05 for {known.size}: large models overfit later")
    return Setting(TASKS[known.task].dropout, f"usual for {known.task}; 0.05 to 0.1 at about 7B")


def targets(known: Known) -> Setting:
    """`target_modules`: which linears of a block are adapted."""
    reach = TASKS[known.task].reach
    if known.preset == "aggressive":
        reach = "all-linear"
    elif known.preset == "conservative":
        reach = "query and value" if known.query_and_value else "attention"
    why = {
        "query and value": "query and value: the least that works well",
        "attention": "query, key, value, output; `all-linear` for harder tasks",
        "all-linear": "the feed-forward too: a hard task",
    }
    return Setting(known.query_and_value if reach == "query and value" else reach, why[reach])


def learning_rate(known: Known) -> Setting:
    """`trainer.learning_rate` of low-rank updates."""
    if known.task == "preferences":
        return Setting("2e-5", "a tenth of what supervised fine-tuning takes: the model must not stray far")
    if known.trained_as == "seq2seq":
        return Setting("1e-3", "encoder-decoders such as T5 take more than decoders")
    if known.large:
        return Setting("1e-4", f"{known.size}; at 70B 5e-5 to 1e-4")
    if known.parameters is not None and known.parameters < SMALL:
        return Setting("4e-4", f"{known.size}: small models take more than 7B's 1e-4 to 3e-4")
    return Setting("2e-4", "1e-4 to 3e-4 at about 7B")


def epochs(known: Known) -> Setting:
    """`trainer.epochs`: few rows are seen more often."""
    if known.rows is None or known.rows < 10_000:
        return Setting(3, "few rows: see each several times, the best evaluation is kept")
    return Setting(2, "10K to 100K rows") if known.rows < 100_000 else Setting(1, "many rows: once is enough")


def batch_size(known: Known) -> Setting:
    """`trainer.batch_size`: a run has a few hundred steps at least."""
    rows = known.rows or 1_000
    size = 8 if rows < 1_000 else 16 if rows < 10_000 else 64
    return Setting(size, "sequences per optimizer step, over all devices")


def method(known: Known) -> Setting:
    """`method.type` where none was asked for."""
    if known.parameters is not None and known.parameters <= 3_000_000_000:
        return Setting("lora", "the weights are small enough to stay in 16 bits")
    return Setting("qlora", "LoRA on a base held in 4 bits: a quarter of the memory, nearly the same quality")


def check(task: str, preset: str) -> tuple[TaskName, Preset]:
    """The names, or RecipeError with the ones there are."""
    from peftctl.config.near import did_you_mean

    for what, name, known in (("task", task, [*TASKS]), ("preset", preset, ["balanced", *PRESETS])):
        if name not in known:
            names = ", ".join(f"`{each}`" for each in known)
            raise RecipeError(f"{what}: unknown: `{name}`", did_you_mean(name, known) or f"one of {names}")
    return task, preset  # type: ignore[return-value]
