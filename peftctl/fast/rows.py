"""Which tokens of a batch are computed, and which rows their attention sees.

Padding is left out: the tokens of all rows lie end to end, and only inside attention do rows of similar length stand
beside one another, padded to the longest of them. Tokens that all rows begin with are computed once, and every row
attends to them; that is exact, because a token sees nothing behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

ALIKE = 0.75
"""Rows of one group are at least this share of its longest."""

SHARED = 8
"""Fewest tokens of a common beginning that are worth computing once."""


class Group(NamedTuple):
    """Rows of similar length."""

    tokens: Tensor
    """Where each token lies among those computed [rows, length]; -1 is padding."""
    after: int
    """How many tokens of the common beginning stand before them."""
    begin: int
    """Where the first of them lies: the tokens of a group lie end to end, row after row."""
    even: bool
    """Whether all rows have one length."""
    standing: Tensor
    """Where each of them stands in `tokens`, as if its rows lay end to end [tokens of the group]."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch as the fast path computes them."""

    source: Tensor
    """Where each computed token stands in the batch [tokens], as if its lines lay end to end."""
    target: Tensor
    """For each place of the batch [lines * width] the computed token that belongs there; padding has the first."""
    positions: Tensor
    """Of the computed tokens in their rows [1, tokens]."""
    groups: tuple[Group, ...]
    """The common beginning, where there is one, is a row of its own, and the first."""
    shared: int
    """Tokens of the common beginning; they are computed first."""
    spans: list[tuple[int, int]]
    """Begin and end of every row in the batch."""


def spans(mask: Tensor | None, positions: Tensor | None, shape: torch.Size) -> list[tuple[int, int]] | None:
    """Begin and end of every row of a batch [lines, width], as if its lines lay end to end; None where they have gaps.

    `mask` marks the tokens of lines that are padded, `positions` begin with 0 in every row of lines that are packed.
    """
    lines, width = shape
    if mask is not None:
        if mask.shape != shape:
            return None
        filled = mask.bool()
        lengths, starts = filled.sum(dim=1), filled.int().argmax(dim=1)
        places = torch.arange(width, device=mask.device)
        within = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
        if not torch.equal(filled, within):
            return None
        begun = [line * width + start for line, start in enumerate(starts.tolist())]
        return [(a, a + n) for a, n in zip(begun, lengths.tolist(), strict=True) if n]
    if positions is None:
        return [(line * width, (line + 1) * width) for line in range(lines)]
    positions = positions.expand(lines, width)
    begins = positions == 0
    begins[:, 0] = True
    edges = [*begins.flatten().nonzero().flatten().tolist(), lines * width]
    found = list(pairwise(edges))
    expected = torch.cat([torch.arange(b - a, device=positions.device) for a, b in found])
    return found if torch.equal(positions.flatten() - expected, torch.zeros_like(expected)) else None


def common(ids: Tensor, found: Sequence[tuple[int, int]]) -> int:
    """How many tokens all rows begin with, less than the shortest row; 0 where that is not worth it. `ids` is flat."""
    most = min(b - a for a, b in found) - 1
    if len(found) < 2 or most < SHARED:
        return 0
    begun = torch.stack([ids[a : a + most] for a, _ in found])
    same = (begun == begun[0]).all(dim=0).int().cumprod(dim=0)
    length = int(same.sum())
    return length if length >= SHARED else 0


def arranged(
    ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, shape: torch.Size, share: bool
) -> Rows | None:
    """How a batch [lines, width] is computed; None where its rows are not what they are in training.

    `share` allows to compute a common beginning once; it needs `ids`.
    """
    found = spans(mask, positions, shape)
    if not found:
        return None
    device = next((one.device for one in (ids, mask, positions) if one is not None), torch.device("cpu"))
    first = common(ids.flatten(), found) if share and ids is not None else 0
    source = list(range(found[0][0], found[0][0] + first))
    target = [0] * shape.numel()
    ordered = sorted(found, key=lambda span: span[0] - span[1])  # the longest first
    grouped: list[list[list[int]]] = []
    for a, b in ordered:
        target[a : a + first] = range(first)
        own = range(len(source), len(source) + b - a - first)
        target[a + first : b] = own
        source += range(a + first, b)
        if not grouped or len(own) < ALIKE * len(grouped[-1][0]):
            grouped.append([])
        grouped[-1].append(list(own))
    beginning = [group([list(range(first))], 0, device)] if first else []
    groups = (*beginning, *(group(rows, first, device) for rows in grouped))
    starts = torch.tensor([0] * first + [a for a, b in ordered for _ in range(a + first, b)], device=device)
    starts[:first] = found[0][0]
    places = torch.tensor(source, device=device)
    positions = (places - starts)[None]
    return Rows(places, torch.tensor(target, device=device), positions, groups, first, found)


def group(rows: Sequence[Sequence[int]], after: int, device: torch.device) -> Group:
    """A group of the tokens of `rows`, the longest row first."""
    longest = len(rows[0])
    standing = [number * longest + i for number, row in enumerate(rows) for i in range(len(row))]
    even = len(rows[-1]) == longest
    return Group(padded(rows, device), after, rows[0][0], even, torch.tensor(standing, device=device))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of numbers [rows, length], filled with -1."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], device=device)
