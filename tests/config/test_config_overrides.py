"""`key.key=value` on top of a file."""

from __future__ import annotations

from typing import Any

import pytest
from config.example import Ship

from peftctl.config.check import check
from peftctl.config.document import parse
from peftctl.errors import Problem, RecipeError

RECIPE = """\
name: a
trainer: {steps: 5, rate: 1}
sources:
  - path: x
  - y
empty:
"""


def overridden(*overrides: str) -> Any:
    return parse(RECIPE, "r.yaml").with_overrides(overrides).data


def problems(*overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as error:
        parse(RECIPE, "r.yaml").with_overrides(overrides)
    return list(error.value.problems)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("trainer.steps=50", ["trainer", "steps"], 50),
        ("trainer.rate=2e-4", ["trainer", "rate"], 2e-4),
        (" trainer . rate = 3 ", ["trainer", "rate"], 3),
        ("name=no", ["name"], "no"),
        ("name='5'", ["name"], "5"),
        ("name=a=b", ["name"], "a=b"),
        ("name=a: b", ["name"], {"a": "b"}),
        ("name=", ["name"], None),
        ("name=''", ["name"], ""),
        ("name=# none", ["name"], None),
        ("eval.labels=[a, b]", ["eval", "labels"], ["a", "b"]),
        ("eval.deep.er={x: [1]}", ["eval", "deep", "er"], {"x": [1]}),
        ("empty.x=1", ["empty", "x"], 1),
        ("trainer={}", ["trainer"], {}),
        ("sources.0.path=z", ["sources", 0, "path"], "z"),
        ("sources.1=z", ["sources", 1], "z"),
        ("sources.0.weight.x=2", ["sources", 0, "weight", "x"], 2),
        ("trainer.0=2", ["trainer", "0"], 2),
    ],
)
def test_an_override_sets_one_value(override: str, path: list[str | int], value: Any) -> None:
    before, found = parse(RECIPE, "r.yaml").data, overridden(override)
    here = found
    for key in path:
        here = here[key]
    assert here == value
    changed = {key for key in {*before, *found} if before.get(key) != found.get(key)}
    assert changed == {path[0]}


def test_later_ones_win_and_build_on_earlier_ones() -> None:
    assert overridden("trainer.steps=1", "trainer.steps=2")["trainer"] == {"steps": 2, "rate": 1}
    assert overridden("trainer={a: {}}", "trainer.a.b=1")["trainer"] == {"a": {"b": 1}}
    assert overridden("trainer.a.b=1", "trainer=")["trainer"] is None


def test_the_document_itself_stays() -> None:
    document = parse(RECIPE, "r.yaml")
    document.with_overrides(["trainer.steps=50", "sources.0.path=z"])
    assert document == parse(RECIPE, "r.yaml")


def test_all_that_is_wrong_at_once() -> None:
    assert problems(
        "trainer.steps", "name.x=1", "x..y=1", "=1", "sources.2.x=1", "sources.a=1", "name=[", "name=1"
    ) == [
        Problem("override `trainer.steps`: expected `key=value`", "write `trainer.steps=VALUE`"),
        Problem("override `name.x=1`: `name` is `a`, which has no key `x`", None),
        Problem("override `x..y=1`: expected names with dots between them before the `=`", None),
        Problem("override `=1`: expected names with dots between them before the `=`", None),
        Problem("override `sources.2.x=1`: `sources` has no item `2`", "its items are numbered 0 to 1"),
        Problem("override `sources.a=1`: `sources` has no item `a`", "its items are numbered 0 to 1"),
        Problem(
            "override `name=[`: not YAML: expected the node content, but found '<stream end>'",
            None,
        ),
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("name=.nan", "override `name=.nan`: `.nan` is no finite number"),
        ("name=!!python/name:os.system", "override `name=!!python/name:os.system`: tags such as"),
        ("name={a: 1, a: 2}", "override `name={a: 1, a: 2}`: a: given twice"),
        ("name=@x", "override `name=@x`: not YAML: found character '@'"),
        ("name=" + "[" * 17, "override `name=[[[[[[[[[[[[[[[[[`: nested deeper than 16 levels"),
        ("a=\udcff", "override `a=\\udcff`: the character U+DCFF is not allowed"),
        ("a\udcff=1", "override `a\\udcff=1`: expected names with dots between them before the `=`"),
        ("a=\x1b[2J", "override `a=\\x1b[2J`: the character U+001B is not allowed"),
        ("name.x.y=1", "override `name.x.y=1`: `name` is `a`, which has no key `x`"),
        ("sources.1.x=1", "override `sources.1.x=1`: `sources.1` is `y`, which has no key `x`"),
        ("sources.-1=1", "override `sources.-1=1`: `sources` has no item `-1`"),
        ("sources.²=1", "override `sources.²=1`: `sources` has no item `²`"),
        ("name=1\n---\n2", "override `name=1\\n---\\n2`: a second document"),
        ("trainer." * 14 + "x={a: [1]}", f"override `{'trainer.' * 12}tra…`: nested deeper than 16 levels"),
        ("a." * 20 + "a=1", f"override `{'a.' * 20}a=1`: nested deeper than 16 levels"),
    ],
)
def test_an_override_keeps_the_rules_of_files(override: str, text: str) -> None:
    (problem,) = problems(override)
    assert problem.text.startswith(text)


def test_long_overrides_are_shortened_in_messages() -> None:
    (problem,) = problems("name=[" + "x" * 1000)
    assert len(problem.text) < 250


def test_checking_names_the_override() -> None:
    document = parse("name: a\nhold: {path: x}\nflag: blue", "r.yaml")
    with pytest.raises(RecipeError) as error:
        check(Ship, document.with_overrides(["boat.power=big", "zzz.a=1", "hold.weight=0", "flag=gren"]))
    assert [problem.text for problem in error.value.problems] == [
        "override `boat.power=big`: boat.power: expected a number; got `big`",
        "override `zzz.a=1`: zzz: unknown key",
        "override `hold.weight=0`: hold.weight: expected above 0; got `0`",
        "override `flag=gren`: flag: expected one of `none`, `red`, `green`; got `gren`",
    ]


def test_a_value_takes_the_form_of_its_field() -> None:
    document = parse("name: a", "r.yaml").with_overrides(["name=1.10", "afloat=no", "labels=[no, 010]", "speed='1e-4'"])
    found = check(Ship, document)
    assert (found.name, found.afloat, found.labels, found.speed) == ("1.10", False, ["no", "010"], 1e-4)


def test_overrides_on_overrides_keep_their_order() -> None:
    document = parse("name: a", "r.yaml").with_overrides(["flag=x"]).with_overrides(["crew=x"])
    with pytest.raises(RecipeError) as error:
        check(Ship, document)
    assert [problem.text.split(":")[0] for problem in error.value.problems] == [
        "override `flag=x`",
        "override `crew=x`",
    ]
