"""Rows to batches: which rows each optimizer step sees, how ranks share them, and tensors out of them.

All pure functions, so that a resumed run, and a run on more processes, sees the same rows in the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from peftctl.data.encode import Encoded
from peftctl.data.packing import best_fit, collate_packed
from peftctl.engine.sample import IGNORED

Packing = Literal["lines", "flat"]
"""How packed rows lie: in lines as long as the longest row of the step, or all of a micro-batch in one line."""


class Part(NamedTuple):
    """Rows of one source, which follow one another, and how often they are seen in an epoch."""

    rows: int
    weight: float = 1.0

    @property
    def seen(self) -> int:
        """How many rows of an epoch are these."""
        return round(self.rows * self.weight)

    def drawn(self, seed: int, number: int, epoch: int) -> list[int]:
        """Which of the rows an epoch sees, of the source of this `number`: each as often as the next, or once more.

        Epochs take turns: what one leaves out comes in the next.
        """
        if self.weight == 1:
            return list(range(self.rows))
        random = Random(f"draw {seed} {number}")
        shuffled = sorted(range(self.rows), key=lambda _: random.random())
        start = epoch * self.seen
        return [shuffled[i % self.rows] for i in range(start, start + self.seen)]


def rows_per_epoch(parts: Sequence[Part]) -> int:
    """Rows in an epoch."""
    return sum(part.seen for part in parts)


def order(parts: Sequence[Part], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of every optimizer step of an epoch, shuffled; the last step may be smaller.

    A function of the numbers of rows, their weights, the seed and the epoch, nothing else; `Random.random` gives the
    same numbers in every version of Python, which `shuffle` does not promise.
    """
    starts = accumulate((part.rows for part in parts), initial=0)
    rows = [
        s + row for s, (n, part) in zip(starts, enumerate(parts), strict=False) for row in part.drawn(seed, n, epoch)
    ]
    random = Random(f"order {seed} {epoch}")
    shuffled = sorted(rows, key=lambda _: random.random())
    return [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], micro_batch_size: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """This rank's part of one step's rows, in micro-batches of at most `micro_batch_size` rows of similar length.

    Every rank gets equally many micro-batches, some of them empty when there are few rows; those at the same place have
    similar lengths, so that no rank waits. The longest come first: what does not fit the memory shows at once.
    """
    rounds = -(-len(rows) // (micro_batch_size * world))
    by_length = sorted(rows, key=lambda row: (-lengths[row], row))
    cuts = [len(rows) * i // (rounds * world) for i in range(rounds * world + 1)] if rows else []
    parts = [by_length[start:end] for start, end in pairwise(cuts)]
    return parts[rank::world]


def collate(
    rows: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right", multiple_of: int = 1
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 [rows, tokens], padded to the longest row.

    `tokens` is rounded up to `multiple_of`. Padding is known by its place, never by its id, so `pad_id` may be the stop
    token. No rows give one row of two `pad_id` that trains nothing: a rank without rows still takes part in the step.
    """
    length = max((len(row) for row in rows), default=2)
    length = -(-length // multiple_of) * multiple_of
    shape = (max(len(rows), 1), length)
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.long) if rows else torch.ones(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        input_ids[i, at] = torch.tensor(row.input_ids)
        attention_mask[i, at] = 1
        labels[i, at] = torch.tensor(row.labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class Layout:
    """How the rows of a step lie in its micro-batches: each row in a line of its own and padded, or packed.

    Packed, the rows go into bins as long as the longest row of the step, and a micro-batch has as many bins as it would
    have rows: it never needs more memory than the longest rows do with padding. The loss is the same either way.
    """

    rows: Sequence[Encoded]
    micro_batch_size: int
    pad_id: int
    packing: Packing | None = None
    collate: Callable[[Sequence[Encoded], int], dict[str, Tensor]] = collate
    """Makes tensors of rows that are not packed, and a padding id."""

    def micro_batches(self, chosen: Sequence[int], rank: int = 0, world: int = 1) -> list[list[list[int]]]:
        """This rank's part of one step's rows `chosen`: micro-batches of bins of rows, equally many on every rank."""
        rows = sorted(chosen)  # a row of a heavy source may be there twice
        lengths = [len(self.rows[row]) for row in rows]
        bins = best_fit(range(len(rows)), lengths, max(lengths)) if self.packing else [[i] for i in range(len(rows))]
        sizes = [sum(lengths[i] for i in bin) for bin in bins]
        parts = micro_batches(range(len(bins)), sizes, self.micro_batch_size, rank, world)
        return [[[rows[i] for i in bins[number]] for number in part] for part in parts]

    def shape(self, part: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Lines and tokens, with padding, of one micro-batch that is not empty."""
        sizes = [sum(len(self.rows[row]) for row in bin) for bin in part]
        return (1, sum(sizes)) if self.packing == "flat" else (len(sizes), max(sizes))

    def batch(self, part: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
        """The tensors of one micro-batch, on `device`."""
        bins = [[self.rows[row] for row in bin] for bin in part]
        if self.packing:
            made = collate_packed(bins, self.pad_id, flat=self.packing == "flat")
        else:
            made = self.collate([row for bin in bins for row in bin], self.pad_id)
        return {key: value.to(device) for key, value in made.items()}
