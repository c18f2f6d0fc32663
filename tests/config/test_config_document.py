"""Reading a recipe: its data, its places, and the files it may be in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftctl.config.document import parse, read
from peftctl.errors import Problem, RecipeError

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
    document = parse("ä: 'öö'\r\nb: {é: 1, ö: 2}\r\n", "r.yaml")
    assert document.spots["ä",].value.text == "r.yaml:1:4"
    assert document.spots["b", "ö"].key.text == "r.yaml:2:11"


def test_aliases_are_copies_with_their_own_keys() -> None:
    document = parse("a: &x {p: [1]}\nb: *x\nc: {d: *x}", "r.yaml")
    assert document.data == {"a": {"p": [1]}, "b": {"p": [1]}, "c": {"d": {"p": [1]}}}
    assert document.data["a"]["p"] is not document.data["b"]["p"]
    assert document.spots["b",].key.text == "r.yaml:2:1"
    assert document.spots["c", "d", "p", 0].value.text == "r.yaml:1:12"


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
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        problem = refusal(file)
    finally:
        os.seteuid(user)
    assert problem == Problem(f"{file}: cannot be read: permission denied", None)


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
