"""How messages, rows and tables look."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from peftctl.cli.console import clean, one_line

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

LABELS = {"error": "bold red", "warning": "bold yellow"}
NARROWEST = 20
"""Columns that a value gets at least, however long the labels are."""


def message(label: str, text: str, hint: str | None) -> list[Text]:
    """`error: what` and, under it, `hint: what to do`."""
    lines = [_labelled("", label, LABELS[label], text)]
    return [*lines, _labelled("  ", "hint", "bold cyan", hint)] if hint else lines


def _labelled(indent: str, label: str, style: str, text: str) -> Text:
    from rich.text import Text

    # a second line is indented, so that no text can pass for a message of its own
    body = Text(clean(text).replace("\n", f"\n{indent}  ").replace("\t", " "))
    body.highlight_regex(r"`[^`\n]+`", "bold")
    return Text.assemble(indent, (f"{label}: ", style), body)


def aligned(rows: Sequence[tuple[str, str]], columns: int | None) -> Iterator[tuple[str, str]]:
    """Labels padded to the longest, values beside them; a value wider than its column goes on below, if told how wide.

    Every line is a pair of both parts.
    """
    rows = [(one_line(label), one_line(value)) for label, value in rows]
    indent = max((len(label) for label, _ in rows), default=0) + 2
    for label, value in rows:
        room = max(columns - indent, NARROWEST) if columns else len(value) + 1
        for line in textwrap.wrap(value, room, break_on_hyphens=False) or [""]:
            yield label.ljust(indent), line
            label = ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Columns under their names, numbers to the right."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        cells = [row[index] for row in rows if index < len(row)]
        side = "right" if cells and all(_is_figure(cell) for cell in cells) else "left"
        grid.add_column(Text(one_line(name)), justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(one_line(cell)) for cell in row))
    return grid


def _is_figure(cell: str) -> bool:
    """Whether a cell is a number, perhaps with a unit, or holds the place of one."""
    return re.fullmatch(r"(\s*|-|[-+]?[\d][\d.,]*(e[-+]?\d+)?( ?[%\w/]+)?)", cell) is not None
