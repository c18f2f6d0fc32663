"""The user's own words inside a message: short, and harmless to a terminal."""

from __future__ import annotations

from typing import Any

from peftctl.config.place import Keys

LONGEST = 60
"""Characters of a value that a message shows."""


def shown(text: str, longest: int = LONGEST) -> str:
    """`text` on one line, shortened, and with what a terminal would obey or not show as escapes."""
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def quoted(text: str) -> str:
    """`text` in backticks."""
    return f"`{shown(text)}`"


def dotted(path: Keys) -> str:
    """`dataset.train.0`, as an override writes it."""
    return ".".join(shown(str(part)) for part in path)


def got(value: Any, written: str | None = None) -> str:
    """What stands where something else was expected; a scalar as `written`, where that is known."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if written is None:
        written = str(value).lower() if isinstance(value, bool) else str(value)
    return quoted(written)
