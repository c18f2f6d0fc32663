"""What a process on a CPU holds beside its tensors, as benchmarks/plan.py has measured it on Linux with glibc.

The allocator keeps what it frees (`models/allocator.py`), and a hole that a tensor leaves rarely fits the next one: how
many holes there are depends on how much comes and goes. The fast path leaves few.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class Habit:
    """Resident bytes: `libraries` + staying + `peak` * passing + `churn` * made + `mixed` * sqrt(passing * made)."""

    libraries: float
    """Bytes of Python, torch, transformers and what they have loaded when training begins."""
    peak: float
    churn: float
    mixed: float

    def passing(self, peak: float, made: float) -> float:
        """Bytes for tensors that come and go, `peak` bytes at once and `made` bytes in a micro-batch."""
        return self.peak * peak + self.churn * made + self.mixed * sqrt(peak * made)


FAST = Habit(574e6, 0.989, 0.0, 0.15)
PLAIN = Habit(671e6, 1.70, 0.0, 0.0)
ALONE = Habit(0.0, 1.0, 0.0, 0.0)
"""A device that holds tensors alone, and counts no others."""
