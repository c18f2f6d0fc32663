"""Rows of preferences as the two conversations, or pairs of texts, that they compare."""

from __future__ import annotations

from peftctl.data.formats import Chat, Example, Pair, Parsed, Preference
from peftctl.data.formats.kinds import Said
from peftctl.errors import DataError


def chosen(example: Example) -> Parsed:
    """The prompt with the better answer. Raises DataError for another kind of row."""
    return answered(preference(example), preference(example).chosen)


def rejected(example: Example) -> Parsed:
    """The prompt with the worse answer. Raises DataError for another kind of row."""
    return answered(preference(example), preference(example).rejected)


def preference(example: Example) -> Preference:
    """The row as a preference, which it has to be."""
    if not isinstance(example, Preference):
        hint = "`preference` rows have `chosen` and `rejected`; `--data FILE` names others"
        raise DataError(f"{example.place}: two answers are compared, and the row has one", hint)
    return example


def answered(row: Preference, answer: Said) -> Parsed:
    """The prompt with one answer."""
    if isinstance(row.prompt, str) and isinstance(answer, str):
        return Pair(row.place, row.prompt, answer)
    assert not isinstance(row.prompt, str), "both are texts, or both are messages"
    assert not isinstance(answer, str), "both are texts, or both are messages"
    return Chat(row.place, [*row.prompt, *answer], first=len(row.prompt), tools=row.tools)
