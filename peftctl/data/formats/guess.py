"""What rows seem to be, from their keys; and what is wrong with a row that is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from peftctl.config.near import did_you_mean
from peftctl.config.quote import quoted
from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Format, Problems
from peftctl.data.formats.kinds import Example
from peftctl.data.formats.table import FORMS
from peftctl.errors import DataError, Problem

ALIASES = {
    "message": "messages",
    "conversation": "messages",
    "dialogue": "messages",
    "dialog": "messages",
    "question": "prompt",
    "query": "prompt",
    "answer": "completion",
    "response": "completion",
    "content": "text",
    "sentence": "text",
    "document": "text",
    "sentiment": "label",
    "picture": "image",
    "category": "label",
}
"""What others call a key."""


def guess(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> Format:
    """What rows of one source seem to be: the first form that at least half of those look like that look like any.

    `columns` are the keys that a recipe maps: what it maps, it means. Raises DataError when no row is anything known.
    """
    meant = [form for form in FORMS.values() if set(columns or ()) <= set(form.keys)]
    likely = [found for row in rows if (found := [form for form in meant if form.is_likely(row.value)])]
    if not likely:
        raise DataError.of([_unknown(row, meant) for row in rows])
    for form in meant:
        if sum(form in found for found in likely) * 2 >= len(likely):
            return form.name
    return likely[0][0].name


def check(row: Row, format: Format) -> Example:
    """The row as `format`. Raises DataError with all that is wrong with it."""
    form = FORMS[format]
    row = row._replace(value=form.renamed(row.value)) if form.also else row
    problems: Problems = list(_missing(row, form))
    if not problems:
        example = form.read(row, problems)
        if not problems:
            return example
    raise DataError.of(problems)


def named(keys: Iterable[str]) -> str:
    """Keys of a row, in words."""
    return ", ".join(quoted(key) for key in list(keys)[:8]) or "none"


def _unknown(row: Row, meant: Sequence[Form]) -> Problem:
    forms = "; ".join(" and ".join(f"`{key}`" for key in form.required) for form in meant)
    text = f"{row.place}: the keys are those of no form of rows: {named(row.value)}"
    hint = _renamed(row, meant) or _near_key(row, [key for form in meant for key in form.keys])
    return Problem(text, hint or f"rows have {forms}; `columns` maps other names")


def _missing(row: Row, form: Form) -> Iterator[Problem]:
    for key in form.required:
        if row.value.get(key) is None:
            what = "is null" if key in row.value else "is missing"
            yield Problem(f"{row.place}: `{key}` {what}", _renamed(row, [form]) or _other(row, form))


def _other(row: Row, form: Form) -> str | None:
    """A near key, or the form that the row looks like instead."""
    looks = next((other.name for other in FORMS.values() if other.is_likely(row.value)), None)
    if looks is not None and not any(row.value.get(key) is not None for key in form.required):
        return f"it looks like `{looks}`, and is read as `{form.name}`"
    return _near_key(row, form.required)


def _renamed(row: Row, forms: Iterable[Form]) -> str | None:
    """The mapping that would make the row a form, with names that others use."""
    if isinstance(row.value.get("translation"), dict) and len(row.value["translation"]) > 1:
        one, two = list(row.value["translation"])[:2]
        return f"`columns: {{source: translation.{one}, target: translation.{two}}}`"
    for form in forms:
        known = {key: other for other, key in ALIASES.items() if row.value.get(other) is not None and key in form.keys}
        mapping = {key: other for key, other in known.items() if key in form.required and row.value.get(key) is None}
        if mapping and all(row.value.get(key) is not None or key in mapping for key in form.required):
            return f"`columns: {{{', '.join(f'{key}: {other}' for key, other in mapping.items())}}}` maps them"
    return None


def _near_key(row: Row, wanted: Iterable[str]) -> str | None:
    wanted = [key for key in wanted if key not in row.value]
    for key in row.value:
        if hint := did_you_mean(key, wanted):
            return f"`{key}`: {hint}"
    return None
