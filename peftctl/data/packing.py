"""Packing: several rows end to end in one line of a batch, where padding would stand.

It is a layout of the forward and never changes its result. Position ids restart with every row; from them transformers
builds attention in which no token sees another row (`masking_utils.find_packed_sequence_indices`, or the variable
length kernels of flash attention), as long as there is no attention mask.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from peftctl.data.encode import Encoded
from peftctl.engine.sample import IGNORED


def best_fit(rows: Iterable[int], lengths: Sequence[int] | Mapping[int, int], capacity: int) -> list[list[int]]:
    """`rows` in bins of at most `capacity` tokens, by best fit decreasing (Johnson, 1973); a row is never cut.

    The longest row first, each into the fullest bin that has room for it, the oldest of several: at most 11/9 of the
    bins that the best packing has, and a few. A function of its arguments alone, in n log n comparisons.
    No row may be longer than `capacity`.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of the bins that are not full, ascending
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        best = bisect_left(room, (lengths[row], 0))
        left, number = room.pop(best) if best < len(room) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(row)
        if left > lengths[row]:
            insort(room, (left - lengths[row], number))
    return bins


def collate_packed(bins: Sequence[Sequence[Encoded]], pad_id: int, flat: bool = False) -> dict[str, Tensor]:
    """`input_ids`, `position_ids` and `labels`, int64 [lines, tokens]: each bin is a line, its rows end to end.

    `flat` lays all bins end to end in one line, as the variable length kernels want it: then nothing is padded. The
    first token of a row is never trained: what stands before it is another row. Padding is a row of its own.
    No rows give one line of two `pad_id` that trains nothing: a rank without rows still takes part in the step.
    """
    lines = [list(chain.from_iterable(bins))] if flat else bins
    length = max((sum(map(len, line)) for line in lines), default=0) or 2
    input_ids = torch.full((max(len(lines), 1), length), pad_id)
    position_ids = torch.arange(length).repeat(len(input_ids), 1)
    labels = torch.full_like(input_ids, IGNORED)
    for i, line in enumerate(lines):
        end = 0
        for row in line:
            start, end = end, end + len(row)
            input_ids[i, start:end] = torch.tensor(row.input_ids)
            position_ids[i, start:end] = torch.arange(len(row))
            labels[i, start + 1 : end] = torch.tensor(row.labels[1:])
        position_ids[i, end:] = torch.arange(length - end)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
