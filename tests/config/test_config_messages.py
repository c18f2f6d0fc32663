"""What is said about a document that does not fit: every mistake at its place, in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as FilePath

import pytest
from config.example import Diesel, Ship

from peftctl.config.block import Block
from peftctl.config.check import check
from peftctl.config.document import parse
from peftctl.errors import Problem, RecipeError


def problems(text: str, cls: type = Ship) -> list[Problem]:
    with pytest.raises(RecipeError) as error:
        check(cls, parse(text, "bad.yaml"))
    return list(error.value.problems)


def texts(text: str) -> list[str]:
    """The problems of a ship that has a name, without hints."""
    return [problem.text for problem in problems("name: a\n" + text)]


def test_the_form_of_messages() -> None:
    text = "name: a\nengine:\n  type: diesel\n  pwer: 3\n\nboat:\n  power: big\n"
    assert problems(text) == [
        Problem("bad.yaml:4:3: engine.pwer: unknown key", "did you mean `power`?"),
        Problem("bad.yaml:7:10: boat.power: expected a number; got `big`", None),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("number: sixteen", "2:9: number: expected a whole number; got `sixteen`"),
        ("number: 2.0", "2:9: number: expected a whole number; got `2.0`"),
        ("number: true", "2:9: number: expected a whole number; got `true`"),
        ("number: [1]", "2:9: number: expected a whole number; got a list"),
        ("number:", "2:8: number: expected a whole number; got nothing"),
        ("number: '2.5'", '2:9: number: expected a whole number; got `"2.5"`'),
        ("speed: false", "2:8: speed: expected a number; got `false`"),
        ("speed: 1_000.5", "2:8: speed: expected a number; got `1_000.5`"),
        ("afloat: 1", "2:9: afloat: expected true or false; got `1`"),
        ("afloat: 'yes'", '2:9: afloat: expected true or false; got `"yes"`'),
        ("mast: {a: 1}", "2:7: mast: expected text; got a mapping"),
        ("labels: a", "2:9: labels: expected a list of texts; got `a`"),
        ("labels: [a, [b], null]", "2:13: labels.1: expected text; got a list"),
        ("watches: []", "2:10: watches: expected at least 1 item; got a list"),
        ("size: [1, 2, 3]", "2:7: size: expected a list of 2 numbers; got a list"),
        ("size: [1]", "2:7: size: expected a list of 2 numbers; got a list"),
        ("size: 1", "2:7: size: expected a list of 2 numbers; got `1`"),
        ("size: [1, big]", "2:11: size.1: expected a number; got `big`"),
        ("engine: diesel", "2:9: engine: `type` must be `diesel` or `sail`"),
        ("engine: {type: rope}", "2:1: engine: `type` must be `diesel` or `sail`"),
        ("engine: {type: sail}", "2:1: engine: missing key `area`"),
        ("engine: {type: diesel, power: 0}", "2:31: engine.power: expected above 0; got `0`"),
        ("engine: {type: diesel, cylinders: 0}", "2:35: engine.cylinders: expected at least 1; got `0`"),
        ("engine: {type: diesel, idle: 1}", "2:30: engine.idle: expected a number from 0 to below 1; got `1`"),
        ("engine: {type: diesel, marks: {a: x}}", "2:35: engine.marks.a: expected a whole number; got `x`"),
        ("engine: {type: diesel, marks: {a: 0}}", "2:35: engine.marks.a: expected at least 1; got `0`"),
        ("boat: {marks: [a]}", "2:15: boat.marks: expected a mapping of names to whole numbers; got a list"),
        ("boat: {turbo: true, cylinders: 2}", "2:1: boat: `turbo` needs at least four `cylinders`"),
        ("boat: 5", "2:7: boat: expected a mapping; got `5`"),
        ("spare: {cylinders: 0}", "2:20: spare.cylinders: expected at least 1; got `0`"),
        ("spare: {power: big}", "2:16: spare.power: expected a number; got `big`"),
        ("spare: 5", "2:8: spare: expected a mapping; got `5`"),
        ("spare: {area: 5}", "2:9: spare.area: unknown key"),
        ("flag: gren", "2:7: flag: expected one of `none`, `red`, `green`; got `gren`"),
        ("flag: 5", "2:7: flag: expected one of `none`, `red`, `green`; got `5`"),
        ("crew: 0", "2:7: crew: expected `auto` or a whole number of at least 1; got `0`"),
        ("crew: aut", "2:7: crew: expected `auto` or a whole number of at least 1; got `aut`"),
        ("ports: {a: 1}", "2:8: ports: expected text or a list of texts; got a mapping"),
        ("ports: [a, {b: 1}]", "2:12: ports.1: expected text; got a mapping"),
        ("decks: x", "2:8: decks: expected a whole number or a list of whole numbers; got `x`"),
        ("decks: [1, x]", "2:12: decks.1: expected a whole number; got `x`"),
        ("cargo: [a, {pth: 1, path: b}]", "2:13: cargo.1.pth: unknown key"),
        ("cargo: [a, [b]]", "2:12: cargo.1: expected text or a mapping; got a list"),
        ("cargo: {share: 2}", "2:16: cargo.share: expected a number from 0 to 1; got `2`"),
        ("cargo: {share: b}", "2:16: cargo.share: expected a number; got `b`"),
        ("cargo: {path: [a]}", "2:15: cargo.path: expected text; got a list"),
        ("cargo: {path: a, weight: 0}", "2:26: cargo.weight: expected above 0; got `0`"),
        ("lights: {prt: red}", "2:10: lights.prt: unknown key"),
        ("draught: -1", "2:10: draught: expected at least 0; got `-1`"),
        ("hold: {}", "2:1: hold: missing key `path`"),
        ("hold:\n  weight: 1", "2:1: hold: missing key `path`"),
        ("nam: b", "2:1: nam: unknown key"),
    ],
)
def test_one_problem_each(text: str, expected: str) -> None:
    found = texts(text)
    assert found[0] == f"bad.yaml:{expected}"
    assert len(found) == (2 if "null" in text else 1)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nam: b", "did you mean `name`?"),
        ("engine: {type: diesel, tubro: yes}", "did you mean `turbo`?"),
        (
            "engine: {type: diesel, zzz: yes}",
            "known keys: `power`, `cylinders`, `idle`, `turbo`, `marks`",
        ),
        ("boat: {zzz: 1}", "known keys: `power`, `cylinders`, `idle`, `turbo`, `marks`"),
        ("cargo: [{pth: a, path: b}]", "did you mean `path`?"),
        ("cargo: {path: b, zz: 1}", "known keys: `path`, `weight`"),
        ("lights: {prt: red}", "did you mean `port`?"),
        ("flag: gren", "did you mean `green`?"),
        ("flag: Red", "did you mean `red`?"),
        ("flag: blue", None),
        ("crew: aut", "did you mean `auto`?"),
        ("boat: {turbo: true, cylinders: 2}", "set `cylinders: 4`"),
    ],
)
def test_hints(text: str, hint: str | None) -> None:
    (problem,) = problems("name: a\n" + text)
    assert problem.hint == hint


def test_the_root_itself() -> None:
    assert problems("flag: red")[0] == Problem("bad.yaml:1:1: missing key `name`", None)
    assert problems("\n\nturbo: yes\ncylinders: 1", Diesel) == [
        Problem("bad.yaml:3:1: `turbo` needs at least four `cylinders`", "set `cylinders: 4`")
    ]


def test_all_at_once_in_order_of_line() -> None:
    text = """\
labels: [{a: 1}]
zeal: 1
engine:
  type: diesel
  marks: {a: 0}
  power: big
boat: {cylinders: 0, spoon: 1}
spare: {r: 1, power: -1}
crew: none
speed: fast
"""
    assert [problem.text for problem in problems(text)] == [
        "bad.yaml:1:1: missing key `name`",
        "bad.yaml:1:10: labels.0: expected text; got a mapping",
        "bad.yaml:2:1: zeal: unknown key",
        "bad.yaml:5:14: engine.marks.a: expected at least 1; got `0`",
        "bad.yaml:6:10: engine.power: expected a number; got `big`",
        "bad.yaml:7:19: boat.cylinders: expected at least 1; got `0`",
        "bad.yaml:7:22: boat.spoon: unknown key",
        "bad.yaml:8:9: spare.r: unknown key",
        "bad.yaml:8:22: spare.power: expected above 0; got `-1`",
        "bad.yaml:9:7: crew: expected `auto` or a whole number of at least 1; got `none`",
        "bad.yaml:10:8: speed: expected a number; got `fast`",
    ]


def test_values_under_an_alias_have_the_place_where_they_are_written() -> None:
    text = "boat: &b {power: x}\nspare: *b"
    assert sorted(texts(text)) == [
        "bad.yaml:2:18: boat.power: expected a number; got `x`",
        "bad.yaml:2:18: spare.power: expected a number; got `x`",
    ]


def test_values_in_messages_are_short_and_harmless() -> None:
    (text,) = texts('number: "\\e[2J' + "x" * 500 + '"')
    assert text.startswith("bad.yaml:2:9: number: expected a whole number; got `\\x1b[2Jxxx")
    assert len(text) < 130


@dataclass(frozen=True, kw_only=True)
class Odd(Block):
    path: FilePath = FilePath("x")
    mixed: bool | float = False


def test_other_types() -> None:
    assert problems("path: [a]", Odd) == [Problem("bad.yaml:1:7: path: expected a path; got a list", None)]
    assert problems("mixed: x", Odd) == [
        Problem("bad.yaml:1:8: mixed: expected true or false or a number; got `x`", None)
    ]
