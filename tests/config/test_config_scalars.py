"""What scalars mean, bare and where a field says what it wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from peftctl.config.block import Block
from peftctl.config.check import check
from peftctl.config.document import parse
from peftctl.errors import RecipeError

WRONG = object()


@dataclass(frozen=True, kw_only=True)
class Text(Block):
    value: str


@dataclass(frozen=True, kw_only=True)
class Whole(Block):
    value: int


@dataclass(frozen=True, kw_only=True)
class Number(Block):
    value: float


@dataclass(frozen=True, kw_only=True)
class Flag(Block):
    value: bool


# as written, data, then as a text, a whole number, a number and a truth value
TABLE: list[tuple[str, Any, Any, Any, Any, Any]] = [
    ("sixteen", "sixteen", "sixteen", WRONG, WRONG, WRONG),
    ("16", 16, "16", 16, 16.0, WRONG),
    ("+16", 16, "+16", 16, 16.0, WRONG),
    ("-16", -16, "-16", -16, -16.0, WRONG),
    ("010", 10, "010", 10, 10.0, WRONG),
    ("0", 0, "0", 0, 0.0, WRONG),
    ("1", 1, "1", 1, 1.0, WRONG),
    ("0o17", 15, "0o17", 15, 15.0, WRONG),
    ("0x1F", 31, "0x1F", 31, 31.0, WRONG),
    ("0b11", "0b11", "0b11", WRONG, WRONG, WRONG),
    ("1_000", "1_000", "1_000", WRONG, WRONG, WRONG),
    ("2e-4", 2e-4, "2e-4", WRONG, 2e-4, WRONG),
    ("2E4", 2e4, "2E4", WRONG, 2e4, WRONG),
    ("1e3", 1000.0, "1e3", WRONG, 1000.0, WRONG),
    ("1.10", 1.1, "1.10", WRONG, 1.1, WRONG),
    ("2.0", 2.0, "2.0", WRONG, 2.0, WRONG),
    ("2.5", 2.5, "2.5", WRONG, 2.5, WRONG),
    (".5", 0.5, ".5", WRONG, 0.5, WRONG),
    ("5.", 5.0, "5.", WRONG, 5.0, WRONG),
    ("-.5e+1", -5.0, "-.5e+1", WRONG, -5.0, WRONG),
    ("1.2.3", "1.2.3", "1.2.3", WRONG, WRONG, WRONG),
    ("12e4567", "12e4567", "12e4567", WRONG, WRONG, WRONG),
    ("9" * 400, "9" * 400, "9" * 400, WRONG, WRONG, WRONG),
    ("true", True, "true", WRONG, WRONG, True),
    ("False", False, "False", WRONG, WRONG, False),
    ("yes", "yes", "yes", WRONG, WRONG, True),
    ("no", "no", "no", WRONG, WRONG, False),
    ("on", "on", "on", WRONG, WRONG, True),
    ("OFF", "OFF", "OFF", WRONG, WRONG, False),
    ("y", "y", "y", WRONG, WRONG, WRONG),
    ("'no'", "no", "no", WRONG, WRONG, WRONG),
    ("'true'", "true", "true", WRONG, WRONG, WRONG),
    ("null", None, WRONG, WRONG, WRONG, WRONG),
    ("~", None, WRONG, WRONG, WRONG, WRONG),
    ("", None, WRONG, WRONG, WRONG, WRONG),
    ("''", "", "", WRONG, WRONG, WRONG),
    ("1:30", "1:30", "1:30", WRONG, WRONG, WRONG),
    ("2024-01-01", "2024-01-01", "2024-01-01", WRONG, WRONG, WRONG),
    ('"1e-4"', "1e-4", "1e-4", WRONG, 1e-4, WRONG),
    ("'16'", "16", "16", 16, 16.0, WRONG),
    ("'2.0'", "2.0", "2.0", WRONG, 2.0, WRONG),
    ("'010'", "010", "010", 10, 10.0, WRONG),
    ("=", "=", "=", WRONG, WRONG, WRONG),
    ("<<", "<<", "<<", WRONG, WRONG, WRONG),
    ("|\n 5\n", "5\n", "5\n", WRONG, WRONG, WRONG),
    ("${HOME}", "${HOME}", "${HOME}", WRONG, WRONG, WRONG),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0][:12])
def test_what_a_scalar_means(row: tuple[Any, ...]) -> None:
    written, data, *readings = row
    document = parse(f"value: {written}", "t.yaml")
    assert document.data == {"value": data}
    assert type(document.data["value"]) is type(data)
    for cls, reading in zip((Text, Whole, Number, Flag), readings, strict=True):
        if reading is WRONG:
            with pytest.raises(RecipeError, match="value: expected"):
                check(cls, document)
        else:
            value = check(cls, document).value
            assert value == reading
            assert type(value) is type(reading)


@pytest.mark.parametrize("written", [".inf", "-.inf", "+.INF", ".nan", ".NaN"])
def test_what_is_not_finite_is_refused(written: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(f"a:\n  b: {written}", "t.yaml")
    assert str(error.value) == f"t.yaml:2:6: a.b: `{written}` is no finite number"


def test_texts_that_look_like_infinity_are_texts_in_quotes() -> None:
    assert check(Text, parse("value: '.inf'", "t.yaml")).value == ".inf"
    with pytest.raises(RecipeError):
        check(Number, parse("value: '.inf'", "t.yaml"))
