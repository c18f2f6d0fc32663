"""TIES and DARE on dense updates of one weight, built one after the other: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Built = tuple[float, Callable[[], Tensor]]
"""A weight, and what builds its update [out, in]."""


def ties(terms: Sequence[Built], density: float) -> Tensor:
    """Trim, elect signs, average what agrees (Yadav et al. 2023, arXiv:2306.01708, algorithm 1, lambda 1): [out, in].

    Trimming is within each matrix, where the paper trims over the whole model. A negative weight turns its update.
    """
    sign = added(weight * trimmed(build(), density) for weight, build in terms).sign()
    agreed, counted = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, build in terms:
        part = weight * trimmed(build(), density)
        agrees = (part.sign() == sign) & (sign != 0)
        agreed += part * agrees
        counted += abs(weight) * agrees
    return agreed / torch.where(counted > 0, counted, 1.0)


def dare(terms: Sequence[Built], density: float, generator: torch.Generator) -> Tensor:
    """Drop and rescale, then add (Yu et al. 2023, arXiv:2311.03099, eq. 1, with p = 1 - density): [out, in]."""

    def part(weight: float, update: Tensor) -> Tensor:
        kept = torch.rand(update.shape, generator=generator) < density
        return (weight / density) * update * kept

    return added(part(weight, build()) for weight, build in terms)


def added(parts: Iterable[Tensor]) -> Tensor:
    """Their sum, one at a time."""
    whole = None
    for part in parts:
        whole = part if whole is None else whole.add_(part)
    assert whole is not None
    return whole


def trimmed(update: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, a share `density` of them; zero elsewhere."""
    size = update.numel()
    dropped = size - max(round(density * size), 1)
    if dropped <= 0:
        return update
    largest = update.abs()
    smallest = largest.flatten().kthvalue(dropped + 1).values
    return torch.where(largest >= smallest, update, 0.0)
