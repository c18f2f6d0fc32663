"""Standard error as rich's console, tamed: it obeys no markup, hides no cursor and never fails."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console

UNWRAPPED = 10_000
"""Columns where there is no terminal: nothing is wrapped for whoever searches the log."""


class Lasting:
    """A stream that may lose its reader or fill its disk: what is told is never worth the run."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Screen(Console):
    """rich's console, but it leaves the cursor alone: whoever ends the process at once could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Nothing."""
        return False


def screen(stream: IO[str] | None = None, **settings: Any) -> Screen:
    """A console on `stream`, by default standard error as it is now."""
    stream = stream or sys.stderr
    if not stream.isatty():
        settings = {"width": UNWRAPPED, **settings}
    file = cast(IO[str], Lasting(stream))
    return Screen(file=file, markup=False, highlight=False, emoji=False, legacy_windows=False, **settings)


def is_live(console: Console) -> bool:
    """Whether a line can be drawn over and over: on a terminal that can, and not where a machine watches (CI)."""
    watched = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return console.file.isatty() and not console.is_dumb_terminal and not watched
