"""JSON files read strictly: every mistake has its line, and nothing is guessed, repaired or dropped.

`.jsonl` holds one object a line, `.json` one list of objects, both in UTF-8 (a byte order mark is tolerated). Duplicate
keys, NaN, infinities, lone surrogates, rows above 16 MB or nested deeper than 64 are mistakes; blank lines are not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from peftctl.config.quote import quoted
from peftctl.data.file import MAX_BYTES, File, Row, not_utf8
from peftctl.errors import DataError, Problem

MAX_DEPTH = 64
"""Deepest nesting of a row; the row itself is one deep."""

_SPACE = " \t\r\n"


class _Refused(ValueError):
    """JSON that Python would read and we do not."""


def lines(file: File) -> Iterator[Row | Problem]:
    """The rows of a `.jsonl` file, and in their places the mistakes."""
    for number, line in file.lines():
        place = f"{file.name}:{number}"
        if line is None:
            yield Problem(f"{place}: the line is longer than {MAX_BYTES // 2**20} MB", "is it one object per line?")
        elif line.strip():
            try:
                yield _row(line.rstrip(b"\r\n").decode(), place)
            except UnicodeDecodeError as error:
                yield not_utf8(place, error)
            except DataError as error:
                yield from error.problems


def _row(text: str, place: str) -> Row:
    try:
        value, end = _decode(text, _skip(text, 0))
    except json.JSONDecodeError as error:
        raise DataError(f"{place}:{error.pos + 1}: not JSON: {_what(error)}", _hint(text)) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{place}: {_refusal(error)}") from None
    if text[end:].strip(_SPACE):
        hint = "one object per line; a list of objects belongs into a `.json` file"
        raise DataError(f"{place}:{end + 1}: more text after the first value of the line", hint)
    return _checked(value, text, place)


def elements(file: File) -> Iterator[Row | Problem]:
    """The rows of a `.json` file, element by element, so that each has its line.

    A mistake in the JSON itself raises DataError: there is no next line to go on from, and skipping the rest would lose
    rows that nobody counted.
    """
    data, name = file.whole(), file.name
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        error = UnicodeDecodeError("utf-8", data[line_start : error.end], error.start - line_start, error.end, "")
        number = data.count(b"\n", 0, line_start) + 1
        raise DataError.of([not_utf8(f"{name}:{number}", error)]) from None
    position, line, seen = _skip(text, 0), 1, 0

    def place(at: int) -> str:
        nonlocal line, seen
        line, seen = line + text.count("\n", seen, at), at
        return f"{name}:{line}"

    if position == len(text):
        return
    if text[position] != "[":
        hint = "a file with one object per line wants the name `.jsonl`" if text[position] == "{" else None
        raise DataError(f"{place(position)}: expected a list of objects", hint)
    position = _skip(text, position + 1)
    if text[position : position + 1] == "]":
        raise DataError(f"{name}: no rows in the file")
    while True:
        try:
            value, end = _decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{place(error.pos)}: not JSON: {_what(error)}") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{place(position)}: {_refusal(error)}") from None
        try:
            yield _checked(value, text[position:end], place(position))
        except DataError as error:
            yield from error.problems
        position = _skip(text, end)
        mark = text[position : position + 1]
        if mark == "]":
            if rest := text[position + 1 :].strip(_SPACE):
                raise DataError(f"{place(position)}: more text after the end of the list: {quoted(rest[:20])}")
            return
        if mark != ",":
            what = "the list has no end" if not mark else f"expected `,` or `]`, got {quoted(mark)}"
            raise DataError(f"{place(position)}: not JSON: {what}")
        position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _checked(value: object, text: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object; got {_kind(value)}", _hint(text))
    if len(text) > MAX_BYTES:
        raise DataError(f"{place}: the row is longer than {MAX_BYTES // 2**20} MB")
    # The number of brackets bounds the depth from above, so hardly any row needs the walk.
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise DataError(f"{place}: nested deeper than {MAX_DEPTH}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            hint = "half of a character; `\\ud83d\\ude00` would be a whole one"
            raise DataError(f"{place}: a lone surrogate in a text", hint) from None
    return Row(place, value)


def _depth(value: object) -> int:
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, depth = todo.pop()
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
        if children is not None:
            deepest = max(deepest, depth)
            todo += [(child, depth + 1) for child in children]
    return deepest


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"the key {quoted(double)} stands twice in one object")
    return value


def _constant(name: str) -> NoReturn:
    raise _Refused(f"`{name}` is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused(f"the number `{text[:20]}` is too large")
    return number


_decode = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float).raw_decode


def _what(error: json.JSONDecodeError) -> str:
    what = (error.msg[:1].lower() + error.msg[1:]).removesuffix(" at").removesuffix(" starting")
    return what.replace("property name enclosed in double quotes", "a key in double quotes")


def _refusal(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested deeper than {MAX_DEPTH}"
    return str(error) if isinstance(error, _Refused) else "a number with too many digits"


def _hint(text: str) -> str | None:
    if text.lstrip(_SPACE).startswith("["):
        return "one object per line; a list of objects belongs into a `.json` file"
    if text.strip(_SPACE) in ("{", "}"):
        return "one object per line, with no line breaks inside"
    return None


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
