"""Rows as long as they may be: a row longer than `max_length` tokens is cut, split, left out or refused."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError

NOTHING_LEFT = "nothing to train is left"
"""What is wrong with a row that was cut before anything trained, as its error says it."""

OnLong = Literal["truncate", "split", "drop", "error"]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row, or one piece of a row: its token ids (int32), and the spans `[start, end)` of them that are trained.

    `cut` counts the row's tokens that are in no piece of it, told on its first one. A row that was split makes `pieces`
    pieces, of which this is number `piece`, from 0; those without a trained token are left out.
    """

    ids: array[int]
    spans: tuple[Span, ...]
    truncated: bool = False
    cut: int = 0
    piece: int = 0
    pieces: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(end - start for start, end in self.spans)

    @property
    def beside(self) -> str:
        """What else of this row the model reads, by name; two rows of the same tokens may differ in it."""
        return ""

    @property
    def input_ids(self) -> list[int]:
        """Token ids [tokens]."""
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        """Token ids where trained, else -100 [tokens]; not shifted."""
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels

    def ended(self) -> Encoded:
        """The row up to its last trained token: a causal model predicts nothing from what comes behind it."""
        return replace(self, ids=self.ids[: self.spans[-1][1]]) if self.spans else self

    def without_end(self) -> Encoded:
        """The row with the token that ends its last answer not trained."""
        *others, (start, end) = self.spans
        return replace(self, spans=(*others, (start, end - 1)))


def fit(row: Encoded, max_length: int, on_long: OnLong, place: str) -> list[Encoded]:
    """The rows that `row` makes: itself where it fits; none when it is dropped; its pieces when it is split.

    Raises DataError at `place` when it is too long (`on_long: error`) or when nothing to train is left.
    """
    if len(row) <= max_length:
        return [row]
    if on_long == "drop":
        return []
    if on_long == "error":
        text = f"{place}: {len(row)} tokens, more than `max_length` {max_length}"
        raise DataError(text, "raise `dataset.max_length`, or choose `on_long: truncate`, `split` or `drop`")
    if on_long == "split":
        kept = list(_pieces(row, max_length))
        left = f"any piece of {max_length} tokens"
    else:
        spans = _within(row.spans, 0, max_length)
        kept = [Encoded(row.ids[:max_length], spans, truncated=True)] if spans else []
        left = f"the first {max_length} tokens"
    if not kept:
        hint = "raise `dataset.max_length`, or choose `on_long: split` or `drop`"
        raise DataError(f"{place}: {NOTHING_LEFT} in {left}", hint)
    kept[0] = replace(kept[0], cut=len(row) - sum(map(len, kept)))
    return kept


def _pieces(row: Encoded, max_length: int) -> Iterator[Encoded]:
    starts = range(0, len(row), max_length)
    for number, start in enumerate(starts):
        if spans := _within(row.spans, start, start + max_length):
            yield Encoded(row.ids[start : start + max_length], spans, piece=number, pieces=len(starts))


def _within(spans: Sequence[Span], start: int, end: int) -> tuple[Span, ...]:
    """What of `spans` lies in tokens `[start, end)`, counted from `start`; its first token has nothing before it."""
    inside = ((max(a - start, 1), min(b, end) - start) for a, b in spans)
    return tuple((a, b) for a, b in inside if a < b)
