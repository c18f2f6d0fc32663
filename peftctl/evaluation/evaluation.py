"""The recipe block `eval`: what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peftctl.config.block import Block, Count

Metric = Literal["loss", "perplexity", "accuracy", "exact_match"]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Block):
    """What to measure on `dataset.eval`, for the base and for the adapter."""

    metrics: list[Metric] = field(default_factory=lambda: ["loss", "perplexity"])
    """`loss` and `perplexity` per trained token; `accuracy`: the most probable of `labels` is the answer;
    `exact_match`: greedy generation gives the answer and nothing else."""
    labels: list[str] = field(default_factory=list)
    """The possible answers, for `accuracy`; added to the metrics when given."""
    max_rows: Count | None = None
    """Evaluate on the first so many rows; all when left out."""
    batch_size: Count = 8
    """Sequences per forward; the figures do not depend on it."""
    max_new_tokens: Count = 64
    """Longest generated answer, in tokens."""

    def __post_init__(self) -> None:
        if "accuracy" in self.metrics and not self.labels:
            raise ValueError("accuracy needs the possible answers; hint: add `labels: [positive, negative]`")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands there twice")
        if len(self.labels) == 1:
            raise ValueError("one label leaves nothing to choose")

    @property
    def wanted(self) -> list[Metric]:
        """The metrics, with `accuracy` when labels are given."""
        extra: list[Metric] = ["accuracy"] if self.labels and "accuracy" not in self.metrics else []
        return [*self.metrics, *extra]
