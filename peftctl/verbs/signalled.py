"""Signals while nothing is lost by stopping at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from peftctl.data.survey import Meter
from peftctl.errors import NothingSaved
from peftctl.training.signals import Stop
from peftctl.verbs.events import Event, Listen, silent

EVERY = 500
"""Rows after which a signal is looked for, and progress told."""
SLOW = 10_000
"""From so many rows on, their preparation takes long enough to tell how far it has come."""


BEFORE = " before the first step", "start again with the same command"
"""How a signal ends what has not begun to train."""


def polled(stop: Stop, outcome: str, hint: str) -> None:
    """Raise NothingSaved when a signal came: that it `stopped by SIGNAL`, what came of it, and what to do."""
    if stop.requested:
        raise NothingSaved(f"stopped by {stop.requested}{outcome}", hint)


P = ParamSpec("P")
R = TypeVar("R")


def stoppable(verb: Callable[P, R]) -> Callable[P, R]:
    """`verb`, which writes at its end alone, looks for a signal whenever it tells how far it is."""

    @wraps(verb)
    def stopped(*args: P.args, **given: P.kwargs) -> R:
        told: Any = given.get("listen", silent)
        with Stop() as stop:

            def listen(event: Event) -> None:
                if event["event"] in ("progress", "note"):
                    polled(stop, "; nothing was written", "run the same command again")
                told(event)

            given["listen"] = listen
            return verb(*args, **given)

    return stopped


def meter(stop: Stop, listen: Listen) -> Meter:
    """Tells how far the preparation of many rows has come, and ends it after a signal."""

    def hear(what: str, done: int, total: int) -> None:
        if done % EVERY == 0 or done == total:
            polled(stop, *BEFORE)
            if total > SLOW:
                listen({"event": "progress", "what": what, "done": done, "total": total})

    return hear
