"""What one process of a comparison does, and what it measured: passed between processes as JSON."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

IGNORED = -100
"""The label of a position that is not trained."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm, once: so many optimizer steps on the given rows."""

    kind: str = "ours"
    """ours | loop | trainer | sft: the module that runs it."""
    model: str = ""
    """A folder of safetensors."""
    rows: str = ""
    """A file of `steps`, the rows of every optimizer step as ids and labels."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Ours alone: the recipe that reads the same rows in the same order; other arms have no use for it."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Ours alone: keys of the recipe's `trainer` that this arm has otherwise."""
    start: str | None = None
    """A PEFT folder that all arms start from; without one each starts as it does by itself."""
    config: dict[str, Any] = field(default_factory=dict)
    """The peers' adapter where there is no `start`: the class in peft and its arguments."""
    steps: int = 3
    batch: int = 4
    """Rows an optimizer step."""
    micro: int = 4
    """Rows a forward."""
    packed: int = 0
    """TRL alone: tokens of a packed line; 0 does not pack."""
    half: bool = False
    """The peers' adapters in bfloat16 instead of peft's default, float32."""
    attention: str = "sdpa"
    """The peers' attention."""
    exact: bool = False
    """The base in float32: what losses would be without rounding."""
    nf4: bool = False
    rate: float = 2e-4
    began: float = 0.0
    """When the process was started [s since the epoch]."""
    result: str = ""
    """The file for the outcome."""

    def read_steps(self) -> list[list[dict[str, list[int]]]]:
        """The rows of every step, the longest first within each: micro-batches of similar length, the same result."""
        steps = json.loads(Path(self.rows).read_text(encoding="utf-8"))["steps"]
        return [sorted(rows, key=lambda row: -len(row["input_ids"])) for rows in steps]

    def write(self, outcome: dict[str, Any]) -> None:
        Path(self.result).write_text(json.dumps(outcome), encoding="utf-8")

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Clock:
    """Takes the time of every step from the end of the one before, so that nothing between steps is left out."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loaded = 0
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.first: float | None = None

    def ready(self) -> None:
        """Everything is loaded and the first step is about to begin; the last call of several counts."""
        self.loaded = high_water()
        self.ends = [time.perf_counter()]

    def step(self, loss: float, tokens: int) -> None:
        """A step is over; `tokens` of rows, padding left out."""
        self.ends.append(time.perf_counter())
        self.first = self.first or time.time() - self.job.began
        self.losses.append(loss)
        self.tokens.append(tokens)

    def outcome(self) -> dict[str, Any]:
        """Seconds, losses and tokens by step; seconds to the end of the first step; peaks [bytes]."""
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return {
            "seconds": seconds,
            "losses": self.losses,
            "tokens": self.tokens,
            "first": self.first,
            "loaded": self.loaded,
            "peak": high_water(),
        }


def high_water() -> int:
    """Most bytes resident so far in this process (VmHWM)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def cut(rows: list[Any], size: int) -> list[list[Any]]:
    """`rows` in pieces of at most `size`."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def trained(rows: list[dict[str, list[int]]]) -> int:
    """Positions whose next token is trained."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
