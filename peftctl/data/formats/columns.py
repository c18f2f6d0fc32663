"""Keys that are called otherwise in a file: `columns: {prompt: question, completion: answers.text.0}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftctl.config.near import did_you_mean
from peftctl.data.file import Row
from peftctl.data.formats.form import Format
from peftctl.data.formats.guess import named
from peftctl.data.formats.table import FORMS
from peftctl.errors import Problem


def mapped(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with each key of `columns` taken from the column it names; a key whose column is missing is too."""
    if not columns:
        return row
    value = {key: item for key, item in row.value.items() if key not in columns}
    for key, column in columns.items():
        if (item := at(row.value, column)) is not None:
            value[key] = item
    return row._replace(value=value)


def at(value: Any, column: str) -> Any:
    """What stands in a column, or below it at a dotted path; None where there is nothing."""
    if isinstance(value, dict) and column in value:
        return value[column]
    for part in column.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif (
            isinstance(value, list) and part.isascii() and part.isdecimal() and len(part) < 9 and int(part) < len(value)
        ):
            value = value[int(part)]
        else:
            return None
    return value


def absent(rows: Iterable[Row], columns: Mapping[str, str], name: str) -> list[Problem]:
    """The columns that none of these rows has, as mistakes of `columns` for the source `name`."""
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row.value))
    return [
        Problem(
            f"{name}: no column `{column}`, which `columns.{key}` names; the rows have {named(keys)}",
            did_you_mean(column, keys),
        )
        for key, column in columns.items()
        if not any(at(row.value, column) is not None for row in rows)
    ]


def refuse_unknown(columns: Mapping[str, str], format: Format | None) -> None:
    """Raise ValueError for keys that the form does not have, or no form at all for None."""
    forms = list(FORMS.values()) if format is None else [FORMS[format]]
    known = list(dict.fromkeys(key for form in forms for key in form.keys))
    for key, column in columns.items():
        if key not in known:
            hint = did_you_mean(key, known) or f"`key: column`, where keys are {', '.join(f'`{k}`' for k in known)}"
            of = f"`{format}` has no key" if format else "no form of rows has a key"
            raise ValueError(f"`columns`: {of} `{key}`; hint: {hint}")
        if not column.strip():
            raise ValueError(f"`columns.{key}` names no column")
    if format is None and columns and not any(set(columns) <= set(form.keys) for form in forms):
        raise ValueError(f"`columns`: no form of rows has all of {named(columns)}")
