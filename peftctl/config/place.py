"""Where things are written: in a file, with line and column, or in an override."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Keys = tuple[str | int, ...]
"""The way to a value: keys of mappings and indices of lists."""


class Place(NamedTuple):
    """Where something is written. Places sort in reading order, overrides after the file."""

    source: int
    """0 for the file, 1 for the first override, and so on."""
    line: int
    column: int
    text: str
    """As messages say it."""


class Spot(NamedTuple):
    """How one value of a document is written."""

    key: Place
    """Of its key; in a list, of the value itself."""
    value: Place
    written: str | None = None
    """A scalar's characters; None for a mapping or a list."""
    quoted: bool = False
    """Marked as text by its author."""


class Mistake(NamedTuple):
    """What is wrong at a place. Mistakes sort as their places."""

    place: Place
    text: str
    hint: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a text comes from: a file, whose places have lines and columns, or an override, which is one place."""

    name: str
    source: int = 0

    def at(self, line: int, column: int) -> Place:
        """The place at a line and a column, both counted from 1."""
        if self.source:
            return Place(self.source, 0, 0, self.name)
        return Place(0, line, column, f"{self.name}:{line}:{column}")

    def whole(self) -> Place:
        """The text as a whole."""
        return Place(self.source, 0, 0, self.name)

    def offset(self, text: str, index: int) -> Place:
        """The place of the character at `index`."""
        before = text[:index].split("\n")
        return self.at(len(before), len(before[-1]) + 1)
