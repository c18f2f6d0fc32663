"""Rows that cannot be used: each mistake with its place, as many as a person reads, and all of them by kind."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peftctl.errors import DataError, Problem

SHOWN = 20
"""How many mistakes are shown; the rest is a number."""

_PLACE = re.compile(r"^.*?:(?:row )?\d+(?::\d+)?: ")
_OWN = re.compile(r"`[^`]*`|\[\d+\]|\d[\d,.]*")


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


def reason(problem: Problem) -> str:
    """What is wrong, in words that other rows share: without the place, and without numbers and quoted words of the
    row, unless they may be the name of a key."""
    return _OWN.sub(lambda found: _shared(found[0]), _PLACE.sub("", problem.text, count=1))


def _shared(own: str) -> str:
    if own.startswith("`"):
        return own if own.strip("`").isidentifier() else "`...`"
    return "[...]" if own.startswith("[") else "N"
