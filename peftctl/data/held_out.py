"""Evaluation rows held out of training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftctl.data.batches import Part
from peftctl.data.ledger import Ledger, of_rows
from peftctl.data.prepare import Prepared
from peftctl.data.texts import Texts
from peftctl.errors import DataError


def hold_out(prepared: Prepared, fraction: float, seed: int) -> tuple[Prepared, Prepared]:
    """Training rows and, held out of them, evaluation rows: a pure function of the rows and the seed.

    At least one row is on either side, with all its pieces; rows that were dropped or skipped stay in the account of
    the training rows.
    """
    starts = prepared.rows.firsts
    number = len(starts)
    if number < 2:
        raise DataError("dataset.eval: one row cannot be split into training and evaluation", "name evaluation rows")
    random = Random(f"hold out {seed}")
    shuffled = sorted(range(number), key=lambda _: random.random())
    held = np.zeros(number, dtype=bool)
    held[shuffled[: min(max(round(number * fraction), 1), number - 1)]] = True
    return part(prepared, starts, ~held, prepared.ledger.left_out), part(prepared, starts, held, Ledger())


def part(prepared: Prepared, starts: NDArray[Any], wanted: NDArray[Any], left_out: Ledger) -> Prepared:
    """Some of the rows: those that begin at `starts` and are `wanted`, with all their pieces."""
    pieces = np.diff(starts, append=len(prepared.rows))
    chosen = np.flatnonzero(np.repeat(wanted, pieces))
    rows = prepared.rows.chosen(chosen)
    ends = [0, *accumulate(one.rows for one in prepared.parts)]
    sizes = np.diff(np.searchsorted(chosen, ends))
    return replace(
        prepared,
        rows=rows,
        parts=[Part(int(size), one.weight) for size, one in zip(sizes, prepared.parts, strict=True)],
        ledger=of_rows(rows) + left_out,
        parsed=some(prepared.parsed, np.flatnonzero(wanted)),
    )


def some(parsed: Sequence[Any], numbers: NDArray[Any]) -> Sequence[Any]:
    """These of the parsed rows, where they were kept."""
    if isinstance(parsed, Texts):
        return parsed.chosen(numbers)
    return [parsed[i] for i in numbers] if parsed else ()
