"""What a row asks, and what it should be answered with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peftctl.data.formats import (
    Captioned,
    Chat,
    Example,
    Feedback,
    Labelled,
    Pair,
    Preference,
    Tagged,
    Text,
    Translated,
)
from peftctl.errors import DataError


def answer(row: Example) -> str | None:
    """What a row should be answered with, without white space around it; None where there is no such text."""
    match row:
        case Chat():
            return str(row.messages[-1].get("content") or "").strip()
        case Pair():
            return row.completion.strip()
        case Translated():
            return row.target.strip()
        case Labelled():
            return str(row.label)
        case Captioned():
            return row.text.strip()
        case Text() | Tagged() | Preference() | Feedback():
            return None


def question(row: Example) -> Any:
    """What a row's answer follows, for a person to read."""
    match row:
        case Chat():
            return row.messages[:-1]
        case Pair() | Preference() | Feedback():
            return row.prompt
        case Translated():
            return row.source
        case Captioned():
            return row.image if isinstance(row.image, str) else "an image"
        case Labelled():
            return row.text if row.pair is None else [row.text, row.pair]
        case Tagged():
            return row.tokens
        case Text():
            return row.text


def answered(row: Example, label: str) -> Example:
    """The row with `label` as its answer; only that answer counts. Raises DataError for one that has none."""
    match row:
        case Chat():
            messages = [*row.messages[:-1], {**row.messages[-1], "content": label}]
            return replace(row, messages=messages, first=len(messages) - 1)
        case Pair():
            lead = row.completion[: len(row.completion) - len(row.completion.lstrip())]
            return replace(row, completion=lead + label)
        case Translated():
            return replace(row, target=label)
        case Labelled():
            return replace(row, label=label)
    raise DataError(f"{row.place}: plain text has no answer to compare with `eval.labels`", "remove `labels`")


def check_answers(rows: Sequence[Example], labels: Sequence[str]) -> None:
    """Raise DataError for the first row whose answer is none of the labels."""
    for row in rows:
        said = answer(row)
        if said is not None and said not in labels:
            names = ", ".join(f"`{label}`" for label in labels)
            text = f"{row.place}: the answer `{said[:60]}` is none of `eval.labels`"
            raise DataError(text, f"labels: {names}")


def any_begins_another(labels: Sequence[str]) -> bool:
    """Whether only the token that ends an answer tells two labels apart, as in `yes` and `yes, but`.

    Else that token does not count in the comparison: a base model that prefers the right word may well talk on.
    """
    return any(one != other and other.startswith(one) for one in labels for other in labels)
