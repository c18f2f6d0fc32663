"""Where the rows of a data set went: nothing is cut or left out without being counted and told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftctl.data.dataset import Dataset
from peftctl.errors import DataError, Problem

SHOWN = 20
"""How many mistakes are shown; the rest is a number."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Where the rows went: `read == kept + dropped + skipped`; `truncated` are some of the kept."""

    read: int
    kept: int
    truncated: int
    dropped: int
    skipped: int

    def __post_init__(self) -> None:
        assert self.read == self.kept + self.dropped + self.skipped, self
        assert self.truncated <= self.kept, self


class Mistakes:
    """Rows that cannot be used: how many they are, and what is wrong with the first of them."""

    def __init__(self) -> None:
        self.rows = 0
        self.problems: list[Problem] = []
        self.more = 0

    def add(self, problems: Sequence[Problem], more: int = 0, rows: int = 1) -> None:
        """`more` are problems that were met and not kept."""
        self.rows += rows
        room = SHOWN - len(self.problems)
        self.problems += problems[:room]
        self.more += more + len(problems[room:])

    def error(self, *after: Problem) -> DataError:
        """All of it as one error; `after` comes last."""
        rest = [Problem(f"... and {self.more} more")] if self.more else []
        return DataError.of([*self.problems, *rest, *after])


def settle(counts: Counts, dataset: Dataset, mistakes: Mistakes, say: Callable[[str], None]) -> None:
    """Tells what was cut or left out. Raises DataError when that is too much, or everything."""
    out = counts.dropped + counts.skipped
    what = f"{out} of {counts.read} rows left out ({counts.dropped} too long, {counts.skipped} that cannot be used)"
    if out / counts.read > dataset.max_skipped:
        hint = "mend the data, or raise `dataset.max_skipped` (and `max_length`, where rows are too long)"
        raise mistakes.error(Problem(f"{what}, more than `dataset.max_skipped` {dataset.max_skipped:g}", hint))
    if not counts.kept:
        raise mistakes.error(Problem(f"no row is left: {what}"))
    if out:
        say(what)
    for text, _ in mistakes.problems:
        say(f"skipped: {text}")
    if counts.truncated:
        say(f"{counts.truncated} of {counts.kept} rows cut to `max_length` {dataset.max_length} tokens")
