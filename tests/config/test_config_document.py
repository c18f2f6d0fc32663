"""Reading: data with places, and the refusal of everything that is no recipe."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peftctl.config.document import parse, read
from peftctl.errors import Problem, RecipeError


def problems(text: str) -> list[Problem]:
    with pytest.raises(RecipeError) as error:
        parse(text, "bad.yaml")
    return list(error.value.problems)


def texts(text: str) -> list[str]:
    return [problem.text for problem in problems(text)]


RECIPE = """\
# a comment
model:
  name: "Llama"   # another
  list: [a, {b: 1}]
steps:
  - 10
  - x: 1
    y: |
      text
"""


def test_data_and_places() -> None:
    document = parse(RECIPE, "r.yaml")
    assert document.data == {
        "model": {"name": "Llama", "list": ["a", {"b": 1}]},
        "steps": [10, {"x": 1, "y": "text\n"}],
    }
    places = {path: (spot.key.text, spot.value.text) for path, spot in document.spots.items()}
    assert places == {
        (): ("r.yaml:2:1", "r.yaml:2:1"),
        ("model",): ("r.yaml:2:1", "r.yaml:3:3"),
        ("model", "name"): ("r.yaml:3:3", "r.yaml:3:9"),
        ("model", "list"): ("r.yaml:4:3", "r.yaml:4:9"),
        ("model", "list", 0): ("r.yaml:4:10", "r.yaml:4:10"),
        ("model", "list", 1): ("r.yaml:4:13", "r.yaml:4:13"),
        ("model", "list", 1, "b"): ("r.yaml:4:14", "r.yaml:4:17"),
        ("steps",): ("r.yaml:5:1", "r.yaml:6:3"),
        ("steps", 0): ("r.yaml:6:5", "r.yaml:6:5"),
        ("steps", 1): ("r.yaml:7:5", "r.yaml:7:5"),
        ("steps", 1, "x"): ("r.yaml:7:5", "r.yaml:7:8"),
        ("steps", 1, "y"): ("r.yaml:8:5", "r.yaml:8:8"),
    }
    assert document.spots["model", "name"].written == "Llama"
    assert document.spots["model", "name"].quoted
    assert not document.spots["steps", 0].quoted


def test_a_place_for_what_is_not_there_is_the_nearest_around_it() -> None:
    document = parse(RECIPE, "r.yaml")
    assert document.problem(("model", "nam", "x"), "gone") == Problem("r.yaml:3:3: model.nam.x: gone", None)


def test_columns_count_characters_and_lines_end_as_they_like() -> None:
    assert texts("ä: 'öö'\r\nb: {é: 1, é: 2}\r\n") == ["bad.yaml:2:11: b.é: given twice"]


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


def test_aliases_are_copies_with_their_own_keys() -> None:
    document = parse("a: &x {p: [1]}\nb: *x\nc: {d: *x}", "r.yaml")
    assert document.data == {"a": {"p": [1]}, "b": {"p": [1]}, "c": {"d": {"p": [1]}}}
    assert document.data["a"]["p"] is not document.data["b"]["p"]
    assert document.spots["b",].key.text == "r.yaml:2:1"
    assert document.spots["c", "d", "p", 0].value.text == "r.yaml:1:12"


def test_aliases_that_explode() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{above}'] * 9)}]\n" for above, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert texts(bomb) == ["bad.yaml:2:36: aliases stand for more than 64 values"]
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
        ("---\n", "bad.yaml:1:4: expected a mapping; got nothing"),
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
        ("%YAML 9.9\n---\na: 1", "bad.yaml:1:1: not YAML: found incompatible YAML document (version 1.1 is required)"),
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


def test_files(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("\ufeffa: 1\n", encoding="utf-8")
    assert read(tmp_path / "quickstart.yaml").data == {"a": 1}
    assert read(str(tmp_path / "quickstart.yaml")).name == f"{tmp_path}/quickstart.yaml"


def refusal(path: str | Path) -> Problem:
    with pytest.raises(RecipeError) as error:
        read(path)
    (problem,) = error.value.problems
    return problem


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("a: 1")
    (tmp_path / "mine.yml").write_text("a: 1")
    assert refusal("recipes/quickstrat.yaml") == Problem(
        "recipes/quickstrat.yaml: no such file", "did you mean `recipes/quickstart.yaml`?"
    )
    assert refusal("recipes/quickstart") == Problem(
        "recipes/quickstart: no such file", "did you mean `recipes/quickstart.yaml`?"
    )
    assert refusal("mine.yaml") == Problem("mine.yaml: no such file", "did you mean `mine.yml`?")
    assert refusal("zzz.yaml") == Problem("zzz.yaml: no such file", None)
    assert refusal("recipe/quickstart.yaml") == Problem(
        "recipe/quickstart.yaml: no such file", "there is no folder `recipe`"
    )


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert refusal("folder") == Problem("folder: a folder; expected a YAML file", None)
    (tmp_path / "folder" / "a.yaml").write_text("a: 1")
    assert refusal("folder") == Problem("folder: a folder; expected a YAML file", "it holds `a.yaml`")
    assert refusal("folder/a.yaml/b") == Problem("folder/a.yaml/b: cannot be read: not a directory", None)
    assert refusal("x" * 5000).text.endswith("cannot be read: file name too long")
    assert refusal("a\0b") == Problem("a\\x00b: cannot be read: embedded null byte", None)
    os.symlink("loop", "loop")
    assert "too many levels of symbolic links" in refusal("loop").text


def test_no_permission(tmp_path: Path) -> None:
    file = tmp_path / "secret.yaml"
    file.write_text("a: 1")
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    assert refusal(file) == Problem(f"{file}: cannot be read: permission denied", None)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"a: 1\nb: \xff", "2:4: not UTF-8 text"),
        ("a: ä\nbä: é".encode("latin-1"), "1:4: not UTF-8 text"),
        ("a: 1".encode("utf-16"), "1:1: not UTF-8 text"),
        ("a: 1".encode("utf-16-le"), "1:2: the character U+0000 is not allowed"),
        (b"a: \xed\xa0\x80", "1:4: not UTF-8 text"),
        (b"\x80\x04\x95", "1:1: not UTF-8 text"),
        (b"", " empty"),
    ],
)
def test_encodings(tmp_path: Path, raw: bytes, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(raw)
    assert refusal(file).text == f"{file}:{expected}"


YAMLISH = st.lists(
    st.sampled_from([*"abc019 \n\t:-?,[]{}#&*!|>'\"%@`~.<=", "a: ", "- ", "\n  ", "*a", "&a ", "!!x ", "\\u", "---\n", "é"])
).map("".join)


@settings(max_examples=400, deadline=2000)
@given(YAMLISH | st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "replace")))
@example("%YAML " + "9" * 5000 + ".1\n---\na: 1")
@example("a: !%FF b")
@example("\ufeff")
@example("a: >-\n\n\n b\n\t")
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        document = parse(text, "r.yaml")
    except RecipeError as error:
        assert all(problem.text.startswith("r.yaml:") for problem in error.problems)
    else:
        assert isinstance(document.data, dict)


@settings(max_examples=100, deadline=2000)
@given(raw=st.binary())
def test_any_bytes_are_read_or_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(raw)
    try:
        assert isinstance(read(file).data, dict)
    except RecipeError as error:
        assert error.problems[0].text.startswith(f"{file}:")
