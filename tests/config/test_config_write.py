"""Blocks to data to YAML, and back."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from config.example import Cargo, Diesel, Sail, Ship
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peftctl.config.check import check
from peftctl.config.document import parse
from peftctl.config.write import dump, to_yaml
from peftctl.errors import RecipeError

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
TRAPS = st.sampled_from(
    [
        *("no", "Yes", "on", "~", "", "null", "true", "010", "0o7", "0x1f", "1:30", "2024-01-01", "1e5", "12e4567"),
        *(".inf", ".nan", "=", "<<", "- a", "a: b", "#", " a", "a ", "a\n", "\n", "*a", "&a", "!a", "%a", "@a", "`a`"),
        *("'", '"', "?", "{", "[a]", "|", ">", "1_000", "0b1", "+.5", "a\tb", "\x85", "\u2028", "\ufeff", "---", "..."),
        *("1.", "-", "e" * 300, "x " * 150, "a\n\n  b\n "),
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | TRAPS
)
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | TRAPS, inner, max_size=4), max_leaves=12
)


def same(one: Any, other: Any) -> bool:
    """Equal with equal types and order, all the way down: 1 is not 1.0, nor True."""
    return repr(one) == repr(other)


@settings(max_examples=150, deadline=2000)
@given(st.dictionaries(TEXT | TRAPS, DATA, max_size=5))
@example({"a": 1e-5, "b": 1e16, "c": 1e300, "d": -0.0, "e": 5e-324, "f": 2e-4, "g": 0.1})
@example({"a": {}, "b": [], "c": [[], {}], "d": [[1, [2]], {"x": [{}]}]})
@example({"a": "x " * 200, "b": "x" * 300, "c": "  x\n\n y \n", "d": "\tx", "e": "a\r\nb", "x" * 200: 1})
def test_yaml_reads_back_equal(data: dict[str, Any]) -> None:
    written = to_yaml(data)
    assert same(parse(written, "r.yaml").data, data)
    assert same(yaml.safe_load(written), data)  # a reader of YAML 1.1


def test_the_form() -> None:
    data = {"b": 2e-4, "a": [1, "no"], "c": {"d": None, "e": True}, "f": "010", "g": "ä", "h": [], "i": 1e16}
    assert to_yaml(data) == (
        "b: 0.0002\na:\n- 1\n- 'no'\nc:\n  d: null\n  e: true\nf: '010'\ng: ä\nh: []\ni: 1.0e+16\n"
    )


def test_lists_that_are_one_object_are_written_twice() -> None:
    shared = [1]
    assert to_yaml({"a": shared, "b": shared}) == "a:\n- 1\nb:\n- 1\n"


def test_tuples_and_paths() -> None:
    assert to_yaml({"a": (1, 2), "b": Path("x/y")}) == "a:\n- 1\n- 2\nb: x/y\n"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), {1: 2}, b"x", {1, 2}, "a\0", "\ud800", 10**400]
)
def test_what_no_recipe_can_hold(value: Any) -> None:
    with pytest.raises(RecipeError):
        to_yaml({"a": [value]})


SHIP = Ship(
    name="010",
    engine=Sail(area=2e-4),
    boat=Diesel(turbo=True, marks={"no": 1, "x.y": 3}),
    ports=["no", "1.10"],
    cargo=["coal", Cargo(path="5", weight=2.5)],
    size=(1e20, 0.1),
    stops=("1", "b"),
    lights={"port": "red"},
    afloat=False,
    draught=0,
)


def test_a_block_dumps_all_of_its_fields_as_plain_data() -> None:
    found = dump(SHIP)
    assert list(found) == [field.name for field in fields(Ship)]
    assert found["engine"] == {"power": 300, "cylinders": 6, "idle": 0.0, "area": 2e-4}
    assert found["cargo"] == ["coal", {"path": "5", "weight": 2.5}]
    assert found["size"] == [1e20, 0.1]
    assert found["spare"] is None


@pytest.mark.parametrize(
    ("instance", "kind"),
    [(SHIP, "sail"), (replace(SHIP, engine=Diesel(idle=0.5), cargo="none", crew=3, hold=Cargo(path="~")), "diesel")],
)
def test_a_dump_reads_back_as_an_equal_instance(instance: Ship, kind: str) -> None:
    data = dump(instance)
    data["engine"] = {"type": kind, **data["engine"]}  # which class it is, only the owner of the field knows
    assert check(Ship, parse(to_yaml(data), "r.yaml")) == instance
