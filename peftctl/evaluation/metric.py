"""What a metric is: statistics of every row that may be added up, and the figure that their sum makes.

That is all that a bootstrap needs: a draw of rows is a sum of their statistics, and its figure comes from that sum as
the figure of all rows does. A BLEU of a draw is the corpus BLEU of its rows, not a mean of sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peftctl.errors import RunError

Array = NDArray[np.float64]

Need = Literal["truth", "labels", "text", "pairs", "feedback", "pictures", "tags"]
"""What a metric reads: log-probabilities of the answers as they are, of the labels as answers, of a better and a
worse answer, or of good and of bad ones; generated answers; what a model makes of noisy pictures; classes of words."""


def nothing() -> Array:
    """No rows."""
    return np.zeros(0)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one model made of n rows; what no metric asked for is empty."""

    nats: Array = field(default_factory=nothing)
    """Minus the log-probability of the trained tokens of each row [n]."""
    tokens: Array = field(default_factory=nothing)
    """How many they are [n]."""
    rejected: Array = field(default_factory=nothing)
    """Minus the log-probability of each row's worse answer [n]; `nats` is then that of the better one."""
    rejected_tokens: Array = field(default_factory=nothing)
    """How many tokens the worse answers have [n]."""
    right: Array = field(default_factory=nothing)
    """How many of them the model puts first, given the right ones before [n]."""
    errors: Array = field(default_factory=nothing)
    """Squared error of what the model predicts of each row's picture with noise in it [n]."""
    labels: Sequence[str] = ()
    """The possible answers."""
    truth: Sequence[int] = ()
    """The label of each row, by number."""
    choice: Sequence[int] = ()
    """The label that the model finds most probable."""
    tags: Sequence[Sequence[str]] = ()
    """The class of each word of each row."""
    found: Sequence[Sequence[str]] = ()
    """The class that the model finds most probable for each of them."""
    answers: Sequence[str | None] = ()
    """What each row should be answered with; None for plain text."""
    said: Sequence[str | None] = ()
    """What the model answered; None for plain text."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a model."""

    name: str
    about: str
    """What it is, in half a line."""
    needs: Need
    better: Literal["higher", "lower"]
    statistics: Callable[[Seen], Array]
    """Of every row [n, k]; zeros where a row has no part in it."""
    figure: Callable[[Array], Array]
    """Sums of statistics [..., k] to figures [...]; nan where the sum holds no row."""
    share: bool = False
    """Whether the statistics are (1 or 0, 1) and the figure is a share of rows."""
    percent: bool = False
    """Whether a person reads it in per cent."""
    absent: str = "no row has a part in it"
    """Why there may be no figure."""
    signature: Callable[[], str] | None = None
    """The settings that figures must share to be compared, in the words of the library that computes them."""


def ratio(sums: Array) -> Array:
    """The first statistic by the second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def written(seen: Seen, statistics: Callable[[str, str], Sequence[float]], number: int) -> Array:
    """`number` statistics of each row's generated answer and its right one; zeros for plain text."""
    rows = [
        [0.0] * number if said is None or answer is None else statistics(said, answer)
        for said, answer in zip(seen.said, seen.answers, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), number)


def library(name: str, package: str) -> Any:
    """A module of a library that not everybody needs. Raises RunError with the command that installs it."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        hint = "install it: `pip install 'peftctl[metrics]'`"
        raise RunError(f"this metric is computed by `{package}`, which is not installed", hint) from None
