"""A document against dataclasses: what is accepted, how fast, and that nothing else than a RecipeError comes out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from pathlib import Path as FilePath
from typing import Any

import pytest
from config.example import Cargo, Diesel, Sail, Share, Ship
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.config.block import Block, Count, Fraction, Positive, Probability
from peftctl.config.check import check, validate
from peftctl.config.document import parse
from peftctl.config.write import to_yaml
from peftctl.errors import RecipeError


def ship(text: str) -> Ship:
    return check(Ship, parse(text, "r.yaml"))


GOOD = """\
name: 010
engine:
  type: diesel
  power: 2e2
  cylinders: "12"
  turbo: yes
  marks: {no: 1, "2": 2}
flag: red
crew: 12
ports: [no, 1.10, yes]
cargo: [coal, {path: 5, weight: 2}]
size: [12, 3.5]
stops: [1, b]
labels: [no, 1, 2.50, true]
watches: [second]
lights: {port: red}
afloat: off
speed: "1e-4"
number: 010
draught:
hold: {path: below}
"""


def test_a_recipe() -> None:
    found = ship(GOOD)
    assert found == Ship(
        name="010",
        engine=Diesel(power=200.0, cylinders=12, turbo=True, marks={"no": 1, "2": 2}),
        flag="red",
        crew=12,
        ports=["no", "1.10", "yes"],
        cargo=["coal", Cargo(path="5", weight=2.0)],
        size=(12.0, 3.5),
        stops=("1", "b"),
        labels=["no", "1", "2.50", "true"],
        watches=["second"],
        lights={"port": "red"},
        afloat=False,
        speed=1e-4,
        number=10,
        hold=Cargo(path="below"),
    )
    assert type(found.size[0]) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ports: 5", "5"),
        ("ports: no", "no"),
        ("ports: [5]", ["5"]),
        ("ports:", None),
        ("ports: []", []),
        ("cargo: 1.10", "1.10"),
        ("cargo: {path: x}", Cargo(path="x")),
        ("cargo: {share: 0.5}", Share(share=0.5)),
        ("cargo: {share: '0.5'}", Share(share=0.5)),
        ("cargo: [1, {path: 2}]", ["1", Cargo(path="2")]),
        ("crew: auto", "auto"),
        ("crew: '5'", 5),
        ("decks: [1, '2']", [1, 2]),
        ("engine: {type: sail, area: 5}", Sail(area=5.0)),
        ("spare: {turbo: true}", Diesel(turbo=True)),
        ("boat: {power: '5e1', turbo: on}", Diesel(power=50.0, turbo=True)),
        ("mast: 12", "12"),
    ],
)
def test_a_field_takes(text: str, value: Any) -> None:
    found = getattr(ship("name: a\n" + text), text.partition(":")[0])
    assert found == value
    assert type(found) is type(value)


@dataclass(frozen=True, kw_only=True)
class Others(Block):
    path: FilePath = FilePath("x")
    mixed: bool | float = False
    names: list[int] | list[str] = field(default_factory=list)
    version: str | float = ""


def test_other_types() -> None:
    assert check(Others, parse("path: 5\nmixed: on\nnames: [1, b]\nversion: 1.10", "r")) == Others(
        path=FilePath("5"), mixed=True, names=["1", "b"], version=1.1
    )


def test_validate_takes_what_is_made_already() -> None:
    made = Diesel()
    assert validate(Diesel, made) is made


def test_a_document_is_left_as_it_was() -> None:
    document = parse(GOOD, "r.yaml")
    assert check(Ship, document) == check(Ship, document)
    assert document.data["name"] == 10


NUMBERS = st.integers(-3, 3) | st.floats(-2, 2)
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "no", "auto", "red", "1", "sail"])
KEYS = st.sampled_from(["type", "path", "share", "power", "turbo", "str", "x", "[key]"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=2000)
@given(st.dictionaries(st.sampled_from([*(field.name for field in fields(Ship)), "other"]), VALUES, max_size=5))
def test_any_data_is_accepted_or_refused_at_places(data: dict[str, Any]) -> None:
    document = parse(to_yaml(data), "r.yaml")
    try:
        found = check(Ship, document)
    except RecipeError as error:
        found_places = [problem.text for problem in error.problems]
        assert len(set(found_places)) == len(found_places)
        assert all(text.startswith("r.yaml:") for text in found_places)
    else:
        assert isinstance(found, Ship)


@dataclass(frozen=True, kw_only=True)
class Part(Block):
    name: str
    rank: Count = 8
    alpha: Positive = 16
    dropout: Probability = 0.0
    share: Fraction = 0.5
    modules: str | list[str] = "all"
    pattern: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Whole(Block):
    parts: list[Part]
    first: Part
    second: Part


def test_a_long_recipe_is_checked_in_no_time() -> None:
    lines = ["name: 010", "rank: 4", "alpha: 2e1", "dropout: .1", "share: 1", "modules: [a, no, 5]", "pattern: {a: 1}"]
    part = "".join(f"  {line}\n" for line in lines)
    items = "".join(f"  - {part.strip()}\n".replace("\n  ", "\n    ") for _ in range(6))
    text = f"first:\n{part}second:\n{part}parts:\n{items}"
    assert text.count("\n") == 59
    check(Whole, parse(text, "warm.yaml"))
    start = time.perf_counter()
    found = check(Whole, parse(text, "r.yaml"))
    assert time.perf_counter() - start < 0.05
    assert found.parts[5].modules == ["a", "no", "5"]
