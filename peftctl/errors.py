"""Everything peftctl raises on purpose.

    PeftctlError              the only exception the command line catches; exit 1
    ├── RecipeError           a recipe, an override or an argument says what cannot be
    ├── DataError             a data file or a row
    ├── ModelError            the base model: not found, not readable, not of this kind
    ├── AdapterError          an adapter: unmatched targets, a damaged or foreign folder
    │   └── NotMergeable      its effect cannot be written into the weights at hand
    ├── StorageError          the disk: full, read-only, a damaged checkpoint
    ├── RunError              a run folder in the wrong state: finished, unfinished, locked
    ├── NonFiniteError        a loss, gradient or weight that is not a number
    ├── NothingLearned        training that changed nothing
    ├── OutOfMemory           it does not fit the memory of the device; exit 4
    ├── GateFailed            a figure on the wrong side of a gate of the recipe; exit 3
    └── Interrupted           stopped by a signal, saved and resumable; exit 75
        └── NothingSaved      stopped by a signal with nothing to go on from; exit 130

A message reads `place: what`, lower case, literals in backticks; the hint says what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self


class Problem(NamedTuple):
    """One mistake: what is wrong and where, and what to do about it."""

    text: str
    hint: str | None = None


class PeftctlError(Exception):
    """A mistake that its user can mend. `problems` holds all of them, never only the first."""

    exit_code = 1

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.problems: tuple[Problem, ...] = (Problem(text, hint),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """One error for several mistakes, in the order given; `problems` must not be empty."""
        error = cls(problems[0].text, problems[0].hint)
        error.problems = tuple(problems)
        return error

    def __str__(self) -> str:
        return "\n".join(text if hint is None else f"{text}; {hint}" for text, hint in self.problems)


class RecipeError(PeftctlError):
    """A recipe, an override or an argument says what cannot be."""


class DataError(PeftctlError):
    """A data file or a row that cannot be used; the place is `file:line`."""


class ModelError(PeftctlError):
    """The base model cannot be found, read or used."""


class AdapterError(PeftctlError):
    """An adapter that fits neither the model nor its own description."""


class NotMergeable(AdapterError):
    """An adapter whose effect cannot be written into the weights at hand."""


class StorageError(PeftctlError):
    """The disk refused, or what it gave back is damaged."""


class RunError(PeftctlError):
    """A run folder that is in the wrong state for what was asked."""


class NonFiniteError(PeftctlError):
    """A loss, gradient or weight that is not a finite number."""


class NothingLearned(PeftctlError):
    """Training that changed nothing: its adapter would do what the base does."""


class OutOfMemory(PeftctlError):
    """It does not fit the memory of the device; the hint names the cheapest change."""

    exit_code = 4


class GateFailed(PeftctlError):
    """A model is worse than `eval.gates` allows, by more than chance; everything is measured and written."""

    exit_code = 3
    result: dict[str, Any]
    """What the evaluation would have returned."""

    @classmethod
    def after(cls, result: dict[str, Any], problems: Sequence[Problem]) -> Self:
        """The error for gates that failed in an evaluation with that result."""
        error = cls.of(problems)
        error.result = result
        return error


class Interrupted(PeftctlError):
    """Stopped by a signal, everything saved; `--resume` goes on."""

    exit_code = 75


class NothingSaved(Interrupted):
    """Stopped by a signal before there was anything to save; the same command starts again."""

    exit_code = 130
