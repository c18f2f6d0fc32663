"""How a verb tells what it does: events, plain dicts that the console renders and a journal can keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Listen = Callable[[Event], None]


def silent(event: Event) -> None:
    """Hears nothing."""


def speaker(listen: Listen) -> Callable[[str], None]:
    """One line of news after the other, as `note` events."""
    return lambda text: listen({"event": "note", "text": text})


def ticker(listen: Listen, what: str) -> Callable[[int, int], None]:
    """How far something long has come, as `progress` events."""
    return lambda done, total: listen({"event": "progress", "what": what, "done": done, "total": total})
