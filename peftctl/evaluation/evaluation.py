"""The recipe block `eval`: what is measured, and what it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from peftctl.config.block import Block, Count, Natural
from peftctl.config.near import did_you_mean
from peftctl.config.quote import quoted, shown
from peftctl.evaluation.gate import Gate, split_key
from peftctl.evaluation.metric import Metric
from peftctl.evaluation.metrics import METRICS
from peftctl.tasks.task import Task, name_of

CONFUSION = "confusion"
"""A table instead of a figure."""

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[*METRICS, CONFUSION]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Block):
    """What to measure on `dataset.eval`, for the base and for the adapter."""

    metrics: list[MetricName] | None = None
    """What the task is usually measured by when left out. Of the right answers: `loss`, `perplexity`,
    `token_accuracy`; of rows with a better and a worse answer also `preference_accuracy`, `preference_margin`; of
    good and bad answers `feedback_margin`. Of the most probable of `labels`: `accuracy`, `macro_f1`, `matthews`,
    `confusion`. Of words with tags: `entity_f1`, `entity_precision`, `entity_recall`. Of greedily generated answers:
    `exact_match`, `bleu`, `chrf`, `rouge1`, `rouge2`, `rougeL`."""
    labels: list[str] = field(default_factory=list)
    """The possible answers, for `accuracy` and its like; `accuracy` is added to the metrics when given."""
    gates: dict[str, Gate] = field(default_factory=dict)
    """What the adapter must reach for exit code 0, by metric: `accuracy: {min: 0.9}`, `loss: {max_ratio: 1.05, against:
    base}`, `bleu: {max_drop: 0.5, against: runs/last}`; `hard/accuracy` holds for the eval set `hard` alone."""
    samples: Natural = 0
    """For how many rows the generated answers of base and adapter are shown and kept side by side."""
    max_rows: Count | None = None
    """Evaluate on the first so many rows of each set; all when left out."""
    batch_size: Count = 8
    """Sequences per forward; the figures do not depend on it."""
    max_new_tokens: Count = 64
    """Longest generated answer, in tokens."""

    def __post_init__(self) -> None:
        for key, gate in self.gates.items():
            name = split_key(key)[1]
            if name not in METRICS:
                hint = did_you_mean(name, METRICS) or f"metrics: {', '.join(METRICS)}"
                raise ValueError(f"gates.{shown(key)}: no metric with a figure is called {quoted(name)}; hint: {hint}")
            if wrong := gate.wrong_for(METRICS[name]):
                raise ValueError(f"gates.{key}: {wrong}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands there twice")
        if len(self.labels) == 1:
            raise ValueError("one label leaves nothing to choose")

    @property
    def wanted(self) -> list[Metric]:
        """The metrics that have a figure, with those of gates, and `accuracy` when labels are given."""
        extra = ["accuracy"] if self.labels else []
        names = [*(self.metrics or ()), *extra, *(split_key(key)[1] for key in self.gates)]
        return [METRICS[name] for name in dict.fromkeys(names) if name in METRICS]

    @property
    def confusion(self) -> bool:
        """Whether to show which label was taken for which."""
        return CONFUSION in (self.metrics or ())

    def of(self, task: Task) -> Evaluation:
        """The block with what `task` is measured by, where it says nothing itself."""
        return self if self.metrics is not None else replace(self, metrics=list(task.metrics))

    def unmeasurable(self, task: Task) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """What of a model trained for `task` cannot be measured: at which keys, why, a way out."""
        for name in [*(self.metrics or ()), *(f"gates.{key}" for key in self.gates)]:
            keys = ("gates", name.removeprefix("gates.")) if name.startswith("gates.") else ("metrics",)
            metric = split_key(keys[-1])[1] if len(keys) > 1 else name
            needs = "labels" if metric == CONFUSION else METRICS[metric].needs
            if needs not in task.judged.measures:
                fitting = [known for known, one in METRICS.items() if one.needs in task.judged.measures]
                yield keys, f"{metric} is not measured of `{name_of(task)}`", f"metrics: {', '.join(fitting)}"
            elif needs == "labels" and not self.labels and not task.head.classifies:
                yield keys, f"{metric} needs the possible answers", "add `labels: [positive, negative]`"
        if self.labels and "labels" not in task.judged.measures:
            yield ("labels",), f"`{name_of(task)}` does not choose among answers", "remove it"

    def needs(self, what: str) -> bool:
        """Whether some metric reads `what` (`truth`, `labels`, `text`) of the model."""
        return any(metric.needs == what for metric in self.wanted) or (what == "labels" and self.confusion)
