"""What is refused as a recipe, all of it at once, and quickly."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peftctl.config.document import Document, parse, read
from peftctl.errors import Problem, RecipeError


def problems(text: str) -> list[Problem]:
    with pytest.raises(RecipeError) as error:
        parse(text, "bad.yaml")
    return list(error.value.problems)


def texts(text: str) -> list[str]:
    return [problem.text for problem in problems(text)]


def test_duplicate_keys() -> None:
    assert problems("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n") == [
        Problem("bad.yaml:4:3: b.c: given twice", "first at bad.yaml:3:3"),
        Problem("bad.yaml:5:1: a: given twice", "first at bad.yaml:1:1"),
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("!!python/object/apply:os.system [echo]", "!!python/object/apply:os.system"),
        ("!!python/name:os.system", "!!python/name:os.system"),
        ("!!binary aGk=", "!!binary"),
        ("!!timestamp 2024-01-01", "!!timestamp"),
        ("!!str 5", "!!str"),
        ("!mine {a: 1}", "!mine"),
        ("! 5", "!"),
        ("!<tag:x> 5", "tag:x"),
    ],
)
def test_tags(value: str, shown: str) -> None:
    assert texts(f"a:\n  b: {value}") == [f"bad.yaml:2:6: a.b: tags such as `{shown}` are not allowed"]


def test_a_tag_on_a_key_or_on_everything() -> None:
    assert texts("!!str a: 1") == ["bad.yaml:1:1: tags such as `!!str` are not allowed"]
    assert texts("!!map\na: 1") == ["bad.yaml:1:1: tags such as `!!map` are not allowed"]


def test_aliases_that_explode() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for above, name in pairwise("abcdefghi"):
        bomb += f"{name}: &{name} [{', '.join([f'*{above}'] * 9)}]\n"
    assert texts(bomb) == ["bad.yaml:2:32: aliases stand for more than 64 values"]
    assert len(parse(f"a: &a [1, 1, 1]\nb: [{', '.join(['*a'] * 16)}]", "r.yaml").data["b"]) == 16
    assert texts(f"a: &a [1, 1, 1]\nb: [{', '.join(['*a'] * 17)}]") == [
        "bad.yaml:2:69: aliases stand for more than 64 values"
    ]


def test_aliases_that_refer_to_themselves_or_to_nothing() -> None:
    assert texts("a: &a [*a]") == ["bad.yaml:1:8: a.0: `*a` refers to itself"]
    assert texts("a: &a\n  b: {c: *a}") == ["bad.yaml:2:10: a.b.c: `*a` refers to itself"]
    assert texts("a: *b\nb: &b 1\nc: *d") == [
        "bad.yaml:1:4: a: `*b` refers to nothing",
        "bad.yaml:3:4: c: `*d` refers to nothing",
    ]


def test_aliases_do_not_go_deeper_than_anything_else() -> None:
    deep = "[" * 10 + "]" * 10
    assert texts(f"a: &a {deep}\nb: [[[[[[[*a]]]]]]]") == ["bad.yaml:2:11: nested deeper than 16 levels"]


def test_depth() -> None:
    assert parse("a: " + "[" * 15 + "]" * 15, "r.yaml").data
    assert texts("a: " + "[" * 16 + "]" * 16) == ["bad.yaml:1:19: nested deeper than 16 levels"]
    assert texts("{a: " * 17 + "}" * 17) == ["bad.yaml:1:65: nested deeper than 16 levels"]


def test_number_of_values() -> None:
    assert len(parse(f"a: [{'1, ' * 4997}]", "r.yaml").data["a"]) == 4997  # with the mapping, the key and the list
    assert texts(f"a: [{'1, ' * 4998}]") == ["bad.yaml:1:14996: more than 5000 keys and values"]


def test_size(tmp_path: Path) -> None:
    head = "a: 1\n#"
    assert parse(head + "x" * (256 * 1024 - len(head) - 1), "r.yaml").data == {"a": 1}
    assert texts(head + "x" * (256 * 1024 - len(head))) == ["bad.yaml: 256 KB or larger"]
    assert texts("a: 1\n#" + "ä" * (128 * 1024)) == ["bad.yaml: 256 KB or larger"]
    file = tmp_path / "large.yaml"
    file.write_text(head + "x" * (256 * 1024 - len(head)))
    with pytest.raises(RecipeError, match=r"large\.yaml: 256 KB or larger"):
        read(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "bad.yaml: empty"),
        ("# nothing\n", "bad.yaml: empty"),
        ("~", "bad.yaml:1:1: expected a mapping; got nothing"),
        ("---\n", "bad.yaml:2:1: expected a mapping; got nothing"),
        ("\n- a", "bad.yaml:2:1: expected a mapping; got a list"),
        ("train", "bad.yaml:1:1: expected a mapping; got `train`"),
        ("a: 1\n---\nb: 1", "bad.yaml:2:1: a second document"),
        ("a: 1\n...\nb: 1", "bad.yaml:3:1: not YAML: expected '<document start>', but found '<block mapping start>'"),
        ("a: b: c", "bad.yaml:1:5: not YAML: mapping values are not allowed here"),
        ("a:\n\t- b", "bad.yaml:2:1: not YAML: found character '\\t' that cannot start any token"),
        ("a: @b", "bad.yaml:1:4: not YAML: found character '@' that cannot start any token"),
        ("a: 'b", "bad.yaml:1:6: not YAML: found unexpected end of stream"),
        ('a: "\\UFFFFFFFF"', "bad.yaml:1:7: not YAML: an escape or a number out of range"),
        ('a: "\\q"', "bad.yaml:1:6: not YAML: found unknown escape character 'q'"),
        ("a: x\0", "bad.yaml:1:5: the character U+0000 is not allowed"),
        ("a: 1\nb: x\x07", "bad.yaml:2:5: the character U+0007 is not allowed"),
        ('a: "x\\0"', "bad.yaml:1:4: the character U+0000 is not allowed"),
        ('a: "\\ud800"', "bad.yaml:1:4: the character U+D800 is not allowed"),
        ('"\\ud800": 1', "bad.yaml:1:1: the character U+D800 is not allowed"),
        ("%YAML 9.9\n---\na: 1", "bad.yaml:1:1: not YAML: found incompatible YAML document (version 1.* is required)"),
        ("1: a", "bad.yaml:1:1: the key `1` is no text"),
        ("a:\n  true: b", "bad.yaml:2:3: a: the key `true` is no text"),
        ("~: a", "bad.yaml:1:1: the key `~` is no text"),
        (".nan: a", "bad.yaml:1:1: the key `.nan` is no text"),
        ("? [a, [b]]\n: c", "bad.yaml:1:3: a key that is no text"),
        ("? {a: b}\n: [c, {d: e}]", "bad.yaml:1:3: a key that is no text"),
    ],
)
def test_what_is_no_recipe(text: str, expected: str) -> None:
    assert texts(text) == [expected]


def test_hints() -> None:
    assert problems("a:\n\t- b")[0].hint == "indent with spaces"
    assert problems("a: @b")[0].hint == "put the value in quotes"
    assert problems("1: a")[0].hint == 'write `"1"`'
    assert problems("a: [1,\nb: 2")[0].hint == "while parsing a flow sequence that starts at bad.yaml:1:4"


def test_quoted_keys_are_texts() -> None:
    assert parse("'1': a\nno: b\n1:30: c\n'': d", "r.yaml").data == {"1": "a", "no": "b", "1:30": "c", "": "d"}


def test_all_mistakes_at_once_and_those_before_a_syntax_error() -> None:
    assert texts("a: .nan\na: !!x y\n3: z\nb: [*q]\nc: [") == [
        "bad.yaml:1:4: a: `.nan` is no finite number",
        "bad.yaml:2:1: a: given twice",
        "bad.yaml:2:4: a: tags such as `!!x` are not allowed",
        "bad.yaml:3:1: the key `3` is no text",
        "bad.yaml:4:5: b.0: `*q` refers to nothing",
        "bad.yaml:5:5: not YAML: expected the node content, but found '<stream end>'",
    ]


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 50_000, "- " * 100_000, "? " * 100_000, "[?" * 50_000])
def test_monstrous_nesting_is_refused_at_once(text: str) -> None:
    start = time.perf_counter()
    assert problems(text)
    assert time.perf_counter() - start < 2


def test_messages_cannot_drive_a_terminal() -> None:
    (text,) = texts('"\\e[2Jx\\n": 1\n"\\e[2Jx\\n": 2')
    assert text == "bad.yaml:2:1: \\x1b[2Jx\\n: given twice"
    (text,) = texts("a: .nan\n" + "b" * 500 + ": .nan")[1:]
    assert len(text) < 150


PIECES = ["a: ", "- ", "\n  ", "*a", "&a ", "!!x ", "\\u", "---\n", "é", *"abc019 \n\t:-?,[]{}#&*!|>'\"%@`~.<="]


def outcome(reading: Callable[[], Document]) -> Document | list[str]:
    """A document, or the problems with it; anything else is a bug."""
    try:
        return reading()
    except RecipeError as error:
        return [problem.text for problem in error.problems]


def right(found: Document | list[str], name: str) -> bool:
    if isinstance(found, Document):
        return isinstance(found.data, dict)
    return bool(found) and all(text.startswith(f"{name}:") for text in found)


@settings(max_examples=300, deadline=2000)
@given(st.lists(st.sampled_from(PIECES)).map("".join) | st.text())
@example("%YAML " + "9" * 5000 + ".1\n---\na: 1")
@example("a: !%FF b")
@example("\ufeff")
@example("a: >-\n\n\n b\n\t")
def test_any_text_is_read_or_refused(text: str) -> None:
    assert right(outcome(lambda: parse(text, "r.yaml")), "r.yaml")


@settings(max_examples=100, deadline=2000)
@given(raw=st.binary())
def test_any_bytes_are_read_or_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(raw)
    assert right(outcome(lambda: read(file)), str(file))
