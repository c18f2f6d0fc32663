"""Gates against figures: a limit fails only where the whole interval lies on its wrong side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peftctl.evaluation.gate import Gate, Limit, split_key
from peftctl.evaluation.metric import Metric
from peftctl.evaluation.metrics import METRICS
from peftctl.evaluation.sheet import Figure, Sheet

ROUNDING = 1e-9
"""Share of a limit by which a figure may miss it: 0.9 - 0.8 is a little more than 0.1."""

Status = Literal["passed", "passed, not certain", "failed"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One limit of one gate on one eval set."""

    set: str
    metric: str
    limit: Limit
    against: str | None
    """What was compared with; None where the limit bounds the figure itself."""
    measured: Figure
    """The figure, or its ratio to, or its difference from that of `against`; a drop is positive."""
    status: Status

    @property
    def name(self) -> str:
        """Such as `hard/accuracy max_drop 0.02 against base`."""
        against = f" against {self.against}" if self.against else ""
        return f"{self.set}/".lstrip("/") + f"{self.metric} {self.limit.kind} {self.limit.value:g}{against}"

    @property
    def words(self) -> str:
        """What was measured, and why that passes or does not."""
        found = f"{self.quantity} {spelled(self.measured, METRICS[self.metric])}"
        if self.status == "failed" and math.isnan(self.measured.estimate):
            return f"{self.quantity} is not a number"
        if self.status == "failed":
            return f"{found}: all of the 95 % interval lies beyond the limit {self.limit.value:g}"
        if self.status == "passed":
            return found
        return f"{found}: beyond the limit {self.limit.value:g}, but not by more than chance"

    @property
    def quantity(self) -> str:
        """What the limit bounds."""
        return {"figure": self.metric, "ratio": "ratio", "difference": self.limit.kind.removeprefix("max_")}[
            self.limit.bounds
        ]


def judged(sheets: Mapping[str, Sheet], gates: Mapping[str, Gate], model: str) -> list[Verdict]:
    """Every limit of every gate on every eval set that it holds for; `against` names a model of the sheets."""
    verdicts = []
    for key, gate in gates.items():
        wanted, metric = split_key(key)
        for name, sheet in sheets.items():
            if wanted in (None, name):
                verdicts += [verdict(sheet, name, metric, model, limit, gate.reference) for limit in gate.limits]
    return verdicts


def verdict(sheet: Sheet, name: str, metric: str, model: str, limit: Limit, reference: str) -> Verdict:
    """One limit on one sheet."""
    if limit.bounds == "figure":
        measured = sheet.figure(model, metric)
    elif limit.bounds == "ratio":
        measured = sheet.ratio(model, reference, metric)
    else:
        first, second = (reference, model) if limit.kind == "max_drop" else (model, reference)
        measured = sheet.difference(first, second, metric)
    lost = math.isnan(sheet.estimate(model, metric))  # a model that computes no numbers is worse than any limit
    least = limit.kind.startswith("min")
    room = ROUNDING * max(abs(limit.value), 1.0)
    low, high = measured.interval
    right = measured.estimate >= limit.value - room if least else measured.estimate <= limit.value + room
    certain = high < limit.value - room if least else low > limit.value + room
    return Verdict(
        set=name,
        metric=metric,
        limit=limit,
        against=None if limit.bounds == "figure" else reference,
        measured=measured,
        status="failed" if certain or lost else "passed" if right else "passed, not certain",
    )


def spelled(figure: Figure, metric: Metric) -> str:
    """`0.912 [0.870, 0.941]`; limits are written in the same unit, so a share is no per cent here."""
    low, high = figure.interval
    digits = 2 if metric.name in ("bleu", "chrf") else 4
    estimate = f"{figure.estimate:.{digits}f}"
    if low == float("-inf"):
        return f"{estimate} (too few rows for an interval)"
    return f"{estimate} [{low:.{digits}f}, {high:.{digits}f}]"
