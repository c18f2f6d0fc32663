"""The statistics of models over the rows of one eval set, and the figures that come of them.

Rows lie in the order of their digests, so no figure and no interval depends on the order of a file, and the sheet of
another run fits whose rows are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from peftctl.data.formats import Example
from peftctl.evaluation.bootstrap import UNKNOWN, Interval, interval, resampled, share
from peftctl.evaluation.metric import Array, Metric, Seen
from peftctl.evaluation.metrics import METRICS


class Figure(NamedTuple):
    """An estimate and where it lies."""

    estimate: float
    interval: Interval


@dataclass(kw_only=True)
class Sheet:
    """One eval set: what was measured of models on the same rows."""

    rows: Sequence[str]
    """The digests of the rows, in order."""
    statistics: dict[str, dict[str, Array]] = field(default_factory=dict)
    """Statistics [n, k] by model and metric."""

    @classmethod
    def of(cls, parsed: Sequence[Example], seen: Mapping[str, Seen], metrics: Sequence[Metric]) -> Sheet:
        """What each of `metrics` takes of what each model made of the rows."""
        digests = [row_digest(row) for row in parsed]
        order = sorted(range(len(digests)), key=lambda i: digests[i])
        statistics = {
            model: {metric.name: metric.statistics(one)[order] for metric in metrics} for model, one in seen.items()
        }
        return cls(rows=[digests[i] for i in order], statistics=statistics)

    @cached_property
    def draws(self) -> dict[str, dict[str, Array]]:
        """The figures [DRAWS] of every model and metric over the same draws of rows."""
        names = [(model, metric) for model, found in self.statistics.items() for metric in found]
        parts = [self.statistics[model][metric] for model, metric in names]
        sums = np.split(resampled(np.concatenate(parts, axis=1)), np.cumsum([part.shape[1] for part in parts])[:-1], 1)
        found: dict[str, dict[str, Array]] = {model: {} for model in self.statistics}
        for (model, metric), sums_of in zip(names, sums, strict=True):
            found[model][metric] = METRICS[metric].figure(sums_of)
        return found

    def taking_part(self, model: str, metric: str) -> int:
        """How many rows have a part in a figure."""
        return int(np.any(self.statistics[model][metric] != 0, axis=1).sum())

    def estimate(self, model: str, metric: str) -> float:
        """The figure over all rows."""
        return float(METRICS[metric].figure(self.statistics[model][metric].sum(axis=0)))

    def figure(self, model: str, metric: str) -> Figure:
        """A figure with its interval."""
        rows = self.taking_part(model, metric)
        found = interval(self.draws[model][metric], rows)
        if METRICS[metric].share and found != UNKNOWN:
            wilson = share(float(self.statistics[model][metric][:, 0].sum()), rows)
            found = Interval(min(found.low, wilson.low), max(found.high, wilson.high))
        return Figure(self.estimate(model, metric), found)

    def difference(self, model: str, other: str, metric: str) -> Figure:
        """A figure minus that of another model, over the same draws."""
        one, two = self.draws[model][metric], self.draws[other][metric]
        value = self.estimate(model, metric) - self.estimate(other, metric)
        return Figure(value, interval(one - two, self.taking_part(model, metric)))

    def ratio(self, model: str, other: str, metric: str) -> Figure:
        """A figure by that of another model, over the same draws."""
        one, two = self.draws[model][metric], self.draws[other][metric]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.divide(self.estimate(model, metric), self.estimate(other, metric))
            return Figure(float(value), interval(one / two, self.taking_part(model, metric)))


def row_digest(row: Example) -> str:
    """What a row is, wherever it stands."""
    content = {part.name: getattr(row, part.name) for part in fields(row) if part.name != "place"}
    text = json.dumps([type(row).__name__, content], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
