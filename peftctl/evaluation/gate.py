"""The recipe block `eval.gates`: what a figure must be for a build to pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from peftctl.config.block import Block, Located, NonNegative, Positive
from peftctl.evaluation.metric import Metric

BASE = "base"
"""What `against` says for the base model."""

HIGHER = {"min": "figure", "min_ratio": "ratio", "max_drop": "difference"}
"""Limits of metrics where more is better, and what they bound."""

LOWER = {"max": "figure", "max_ratio": "ratio", "max_rise": "difference"}
"""Limits of metrics where less is better."""

RELATIVE = ("min_ratio", "max_ratio", "max_drop", "max_rise")


class Limit(NamedTuple):
    """One limit of a gate."""

    kind: str
    value: float

    @property
    def bounds(self) -> str:
        """What it bounds: the figure, its ratio to another model's, or the difference from it."""
        return {**HIGHER, **LOWER}[self.kind]


@dataclass(frozen=True, kw_only=True)
class Gate(Block):
    """Limits of one metric of the adapter. It fails where the whole 95 % interval lies on the wrong side."""

    min: float | None = None
    """Least figure, for metrics where more is better."""
    max: float | None = None
    """Largest figure, for metrics where less is better."""
    min_ratio: Positive | None = None
    """Least ratio to the figure of `against`, where more is better."""
    max_ratio: Positive | None = None
    """Largest ratio to the figure of `against`, where less is better."""
    max_drop: NonNegative | None = None
    """How far the figure may lie below that of `against`, where more is better."""
    max_rise: NonNegative | None = None
    """How far the figure may lie above that of `against`, where less is better."""
    against: Located | None = None
    """`base` (also when left out), or the folder of another run that was evaluated on the same rows."""

    def __post_init__(self) -> None:
        if not self.limits:
            raise ValueError("a gate without a limit; hint: one of `min`, `max`, `max_drop`, `max_rise`, `max_ratio`")
        if self.against and not any(limit.kind in RELATIVE for limit in self.limits):
            raise ValueError("`against` without a limit that compares; hint: `max_drop`, `max_rise`, or a ratio")

    @property
    def limits(self) -> list[Limit]:
        """The limits that are set."""
        return [Limit(kind, getattr(self, kind)) for kind in (*HIGHER, *LOWER) if getattr(self, kind) is not None]

    @property
    def reference(self) -> str:
        """What relative limits compare with."""
        return self.against or BASE

    def wrong_for(self, metric: Metric) -> str | None:
        """Why a limit makes no sense for `metric`, with a hint; None when all do."""
        good, other = (HIGHER, LOWER) if metric.better == "higher" else (LOWER, HIGHER)
        for limit in self.limits:
            if limit.kind in other:
                way = "more" if metric.better == "higher" else "less"
                meant = list(good)[list(other).index(limit.kind)]
                return f"`{limit.kind}`: of {metric.name} {way} is better; hint: did you mean `{meant}`?"
        return None


def split_key(key: str) -> tuple[str | None, str]:
    """A key of `gates`, `accuracy` or `hard/accuracy`, as the name of a set (None: every set) and of a metric."""
    name, slash, metric = key.rpartition("/")
    return (name if slash else None), metric
