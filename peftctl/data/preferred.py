"""Preferences, and answers that were judged, as the conversations or pairs of texts that they are made of."""

from __future__ import annotations

from peftctl.data.formats import Chat, Example, Feedback, Pair, Parsed, Preference
from peftctl.data.formats.kinds import Said
from peftctl.errors import DataError


def chosen(example: Example) -> Parsed:
    """The prompt with the better answer. Raises DataError for another kind of row."""
    return answered(preference(example), preference(example).chosen)


def rejected(example: Example) -> Parsed:
    """The prompt with the worse answer. Raises DataError for another kind of row."""
    return answered(preference(example), preference(example).rejected)


def judged_answers(example: Example) -> list[tuple[Parsed, bool]]:
    """The prompt with each answer that there is to it, and whether that is a good one. Raises DataError."""
    match example:
        case Feedback():
            return [(answered(example, example.completion), example.desirable)]
        case Preference():
            return [(chosen(example), True), (rejected(example), False)]
    hint = "rows have `prompt`, `completion` and `label`, or `prompt`, `chosen` and `rejected`"
    raise DataError(f"{example.place}: nothing says whether its answer is a good one", hint)


def preference(example: Example) -> Preference:
    """The row as a preference, which it has to be."""
    if not isinstance(example, Preference):
        hint = "rows have `prompt`, `chosen` and `rejected`; `task: sft` learns from one answer"
        if isinstance(example, Feedback):
            hint = "`task: kto` learns from single answers that are good or bad, `feedback_margin` measures them"
        raise DataError(f"{example.place}: two answers are compared, and the row has one", hint)
    return example


def answered(row: Preference | Feedback, answer: Said) -> Parsed:
    """The prompt with one answer."""
    if isinstance(row.prompt, str) and isinstance(answer, str):
        return Pair(row.place, row.prompt, answer)
    assert not isinstance(row.prompt, str), "both are texts, or both are messages"
    assert not isinstance(answer, str), "both are texts, or both are messages"
    return Chat(row.place, [*row.prompt, *answer], first=len(row.prompt), tools=row.tools)
