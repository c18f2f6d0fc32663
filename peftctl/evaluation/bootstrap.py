"""Intervals by resampling rows: how far a figure would move if other rows of the same kind had been drawn.

A draw takes n rows out of n with replacement (Efron 1979). Two models are compared over the same draws, so what makes
a row hard for both cancels out (paired bootstrap, Koehn 2004). Percentiles of draws are too narrow for few rows; they
are taken further out as Hesterberg (2015, section 4.2) has it: at Phi(-sqrt(n / (n - 1)) t) instead of 2.5 %.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from peftctl.evaluation.metric import Array

DRAWS = 2000
SEED = 20041
"""Fixed: the same rows have the same interval."""
CONFIDENCE = 0.95
FEWEST = 6
"""With fewer rows not even the whole range of draws covers 95 %: 1 - 2 / 2^5 is less."""
AT_ONCE = 4_000_000
"""Counts of rows in memory at a time."""


class Interval(NamedTuple):
    """Where a figure lies, with 95 % confidence; infinite on both sides where there are too few rows to tell."""

    low: float
    high: float


UNKNOWN = Interval(-math.inf, math.inf)


def resampled(statistics: Array) -> Array:
    """Sums [DRAWS, k] of the statistics [n, k] of n rows over the draws, which depend on n alone."""
    rows, draws = len(statistics), np.random.default_rng(SEED)
    sums = np.empty((DRAWS, statistics.shape[1]))
    step = max(AT_ONCE // max(rows, 1), 1)
    for start in range(0, DRAWS, step):
        size = min(step, DRAWS - start)
        counts = [np.bincount(draws.integers(rows, size=rows), minlength=rows) for _ in range(size)]
        sums[start : start + size] = np.stack(counts).astype(np.float64) @ statistics
    return sums


def interval(figures: Array, rows: int) -> Interval:
    """Where the figure lies, from its values [DRAWS] over draws of `rows` rows; draws without a value do not count."""
    known = figures[~np.isnan(figures)]
    if rows < FEWEST or not len(known):
        return UNKNOWN
    outside = tail(rows)
    low, high = np.quantile(known, [outside, 1 - outside], method="nearest")
    return Interval(float(low), float(high))


def tail(rows: int) -> float:
    """The share of draws on either side of the interval."""
    normal = NormalDist()
    z, free = normal.inv_cdf((1 + CONFIDENCE) / 2), rows - 1
    # Student's t by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return normal.cdf(-math.sqrt(rows / free) * t)


def share(right: float, rows: float) -> Interval:
    """Wilson's interval of a share: it has a width where all rows, or none, are right, and all draws are the same."""
    if rows < FEWEST:
        return UNKNOWN
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle, scale = right / rows + z**2 / (2 * rows), 1 + z**2 / rows
    half = z * math.sqrt(right / rows * (1 - right / rows) / rows + z**2 / (4 * rows**2))
    return Interval((middle - half) / scale, (middle + half) / scale)
