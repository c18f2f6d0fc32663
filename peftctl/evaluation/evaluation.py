"""The recipe block `eval`: what is measured, and what it must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from peftctl.config.block import Block, Count, Natural
from peftctl.config.near import did_you_mean
from peftctl.evaluation.gate import Gate, split_key
from peftctl.evaluation.metric import Metric
from peftctl.evaluation.metrics import METRICS

CONFUSION = "confusion"
"""A table instead of a figure."""

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[*METRICS, CONFUSION]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Block):
    """What to measure on `dataset.eval`, for the base and for the adapter."""

    metrics: list[MetricName] = field(default_factory=lambda: ["loss", "perplexity"])
    """Of the right answers: `loss`, `perplexity`, `token_accuracy`; of rows with a better and a worse answer also
    `preference_accuracy`, `preference_margin`. Of the most probable of `labels`: `accuracy`,
    `macro_f1`, `matthews`, `confusion`. Of greedily generated answers: `exact_match`, `bleu`, `chrf`, `rouge1`,
    `rouge2`, `rougeL`."""
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
                raise ValueError(f"gates.{key}: no metric with a figure is called `{name}`; hint: {hint}")
            if wrong := gate.wrong_for(METRICS[name]):
                raise ValueError(f"gates.{key}: {wrong}")
        asked = [metric.name for metric in self.wanted if metric.needs == "labels"]
        if not self.labels and (asked or self.confusion):
            what = asked[0] if asked else CONFUSION
            raise ValueError(f"{what} needs the possible answers; hint: add `labels: [positive, negative]`")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands there twice")
        if len(self.labels) == 1:
            raise ValueError("one label leaves nothing to choose")

    @property
    def wanted(self) -> list[Metric]:
        """The metrics that have a figure, with those of gates, and `accuracy` when labels are given."""
        extra = ["accuracy"] if self.labels else []
        names = [*self.metrics, *extra, *(split_key(key)[1] for key in self.gates)]
        return [METRICS[name] for name in dict.fromkeys(names) if name in METRICS]

    @property
    def confusion(self) -> bool:
        """Whether to show which label was taken for which."""
        return CONFUSION in self.metrics

    def needs(self, what: str) -> bool:
        """Whether some metric reads `what` (`truth`, `labels`, `text`) of the model."""
        return any(metric.needs == what for metric in self.wanted) or (what == "labels" and self.confusion)
