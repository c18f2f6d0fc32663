"""What the steps of a run say about its loss, its speed and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

MEMORY = 20
"""Steps over which speed is averaged and the trend of the loss is read."""
SMOOTHING = 0.9
"""Weight of the past in running means."""
WATCHED = {"reward_accuracy": "accuracy", "reward_margin": "margin", "kl": "kl"}
"""What a step may tell beside its loss, and what it is called in a line."""
NOTABLE = 0.005
"""Share by which the loss must move for a trend."""


class Pace:
    """Hears every step; answers for the last one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin: tuple[float, int] | None = None
        self._heard = 0.0
        self._sums: dict[str, float] = {}
        self._weight = 0.0
        self._losses: deque[float] = deque(maxlen=MEMORY + 1)
        self._speeds: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self.last: dict[str, Any] = {}

    def hear(self, event: dict[str, Any]) -> None:
        """One `step` event."""
        self.last, self._heard = event, self._clock()
        if self._begin is None:
            self._begin = self._heard - event["seconds"], event["step"] - 1
        self._sums = {
            key: SMOOTHING * self._sums.get(key, 0.0) + event[key] for key in ("loss", *WATCHED) if key in event
        }
        self._weight = SMOOTHING * self._weight + 1
        self._losses.append(self.loss)
        self._speeds.append((event["tokens"], event["seconds"]))

    @property
    def loss(self) -> float:
        """Running mean of the loss, whose first value is the first loss itself."""
        return self._sums["loss"] / self._weight

    @property
    def watched(self) -> dict[str, float]:
        """The same of what the task tells beside it."""
        return {key: total / self._weight for key, total in self._sums.items() if key != "loss"}

    @property
    def trend(self) -> int:
        """-1 while the loss falls, 1 while it rises, 0 while it stays or nothing can be said yet."""
        before, now = self._losses[0], self._losses[-1]
        return (now > before * (1 + NOTABLE)) - (now < before * (1 - NOTABLE))

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps, without what lies between them."""
        seconds = sum(seconds for _, seconds in self._speeds)
        return sum(tokens for tokens, _ in self._speeds) / seconds if seconds > 0 else None

    @property
    def finished(self) -> bool:
        """Whether the last step was the run's last."""
        return bool(self.last["step"] >= self.last["steps"])

    @property
    def seconds_left(self) -> float:
        """At the speed so far, evaluations and checkpoints included; it falls while a step takes its time."""
        assert self._begin is not None
        start, first = self._begin
        per_step = (self._heard - start) / (self.last["step"] - first)
        left: float = per_step * (self.last["steps"] - self.last["step"])
        return max(0.0, left - (self._clock() - self._heard))


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`, `2 d 04:10:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02}"
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def rate(value: float) -> str:
    """A learning rate: `2e-4`, `1.25e-5`."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    short = mantissa.rstrip("0").rstrip(".")
    return f"{short}e{int(exponent)}" if value else "0"


def figures(watched: Mapping[str, float]) -> dict[str, str]:
    """What of `WATCHED` an event tells, by its word in a line."""
    return {word: f"{watched[key]:.3f}" for key, word in WATCHED.items() if key in watched}


def quantity(value: float) -> str:
    """A count in at most five characters: `940`, `1,240`, `12.4k`, `3.1M`."""
    if value < 10:
        return f"{value:.1f}"
    if value < 9_999.5:
        return f"{value:,.0f}"
    return f"{value / 1e3:.1f}k" if value < 999_950 else f"{value / 1e6:.1f}M"
