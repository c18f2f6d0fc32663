"""A document to a frozen dataclass, or all that is wrong with it, each with its place.

pydantic checks the data as strictly as JSON: no text is a number, no number a text, 2.0 is no whole number. What a
field's type makes of an unquoted scalar (`010` as text, `no` as a truth value) is settled afterwards: where pydantic
wanted another type, and the characters as they were written are one, they take the value's place.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from types import NoneType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from peftctl.config.document import Document
from peftctl.config.flaw import Flaw, flaws
from peftctl.config.place import Keys, Place, Spot
from peftctl.config.quote import dotted, got
from peftctl.config.scalar import plain
from peftctl.errors import Problem, RecipeError

T = TypeVar("T")

FLAGS = {"yes": True, "on": True, "no": False, "off": False}
"""What YAML 1.1 took for a truth value, and people still write."""


def check(cls: type[T], document: Document) -> T:
    """`document` as an instance of the dataclass `cls`. Raises RecipeError with every mistake, in reading order."""
    data = deepcopy(document.data)
    settled: set[Keys] = set()
    while True:
        try:
            return validate(cls, data)
        except ValidationError as error:
            found = _flaws(error)
        again = [flaw for flaw in found if flaw.path in document.spots and flaw.path not in settled]
        values = {flaw.path: _as_wanted(document.spots[flaw.path], flaw) for flaw in again}
        values = {path: value for path, value in values.items() if value is not None}
        if not values:
            raise RecipeError.of(_problems(found, document))
        for path, value in values.items():
            _set(data, path, value)
        settled |= values.keys()


def validate(cls: type[T], data: Any) -> T:
    """Plain data as an instance of the dataclass `cls`: for the validator of a field whose class hangs on its value.

    Raises pydantic.ValidationError, whose errors `check` reports at their places when the validator lets it pass.
    """
    if isinstance(data, cls):
        return data
    try:
        kind: type = cls
        instance: T = adapter(kind).validate_json(json.dumps(data), strict=True)
        return instance
    except ValidationError as error:
        found = flaws(error.errors(include_url=False), cls, data)
    raise ValidationError.from_exception_data(cls.__name__, [_details(flaw) for flaw in found])


@cache
def adapter(cls: type[Any]) -> TypeAdapter[Any]:
    """pydantic's view of the dataclass `cls`."""
    return TypeAdapter(cls)


def _details(flaw: Flaw) -> InitErrorDetails:
    kind = PydanticCustomError("flaw", "{text}", {"text": flaw.text, "flaw": flaw})
    return {"type": kind, "loc": flaw.path, "input": None}


def _flaws(error: ValidationError) -> list[Flaw]:
    return [line["ctx"]["flaw"] for line in error.errors(include_url=False)]


def _as_wanted(spot: Spot, flaw: Flaw) -> Any:
    """The scalar at `spot` as one of the types that `flaw` wants, or None."""
    if spot.written is None:
        return None
    value = plain(spot.written)
    if spot.quoted:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = number and isinstance(value, int)
        return value if ("float" in flaw.wanted and number) or ("int" in flaw.wanted and whole) else None
    if "bool" in flaw.wanted and spot.written.lower() in FLAGS:
        return FLAGS[spot.written.lower()]
    if not isinstance(value, str | NoneType) and (flaw.wanted & {"string", "path"} or spot.written in flaw.choices):
        return spot.written
    return None


def _set(data: Any, path: Keys, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def _problems(found: list[Flaw], document: Document) -> list[Problem]:
    placed = sorted([(_place(flaw, document), flaw) for flaw in found], key=lambda pair: pair[0])
    problems = []
    for place, flaw in placed:
        prefix = f"{place.text}: {dotted(flaw.path)}: " if flaw.path else f"{place.text}: "
        suffix = ""
        if flaw.expected and flaw.path in document.spots:
            suffix = f"; got {got(document.value(flaw.path), _written(document.spots[flaw.path]))}"
        problems.append(Problem(prefix + flaw.text + suffix, flaw.hint))
    return problems


def _written(spot: Spot) -> str | None:
    """A scalar's characters, in quotes where it would be something else without them."""
    if spot.written is None or not spot.quoted:
        return spot.written
    other = spot.written.lower() in FLAGS or not isinstance(plain(spot.written), str)
    return f'"{spot.written}"' if other else spot.written


def _place(flaw: Flaw, document: Document) -> Place:
    spot = document.spot(flaw.path)
    whole = flaw.about_block and spot.written is None
    return spot.key if flaw.about_key or whole else spot.value
