from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftctl.data.dataset import Source
from peftctl.data.file import MAX_BYTES, File, Row
from peftctl.data.sources import read_file
from peftctl.errors import DataError, Problem

GOOD = b'{"text": "a"}\n'
SURROGATE = b'{"text": "\\ud800"}'

# What stands on line 3 of a .jsonl file, and what the message has to say about it.
MALFORMED = {
    "not json": (b"text: a", "not JSON"),
    "cut off": (b'{"text": "a"', "not JSON"),
    "single quotes": (b"{'text': 'a'}", "a key in double quotes"),
    "trailing comma": (b'{"text": "a",}', "not JSON"),
    "comment": (b'{"text": "a"} // why', "more text"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "more text"),
    "list": (b'[{"text": "a"}]', "expected an object; got a list"),
    "text": (b'"a"', "expected an object; got a text"),
    "number": (b"7", "expected an object; got a number"),
    "null": (b"null", "expected an object; got null"),
    "truth": (b"true", "expected an object; got true or false"),
    "pretty printed": (b"{", "not JSON"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "the key `text` stands twice"),
    "duplicate key inside": (b'{"text": {"b": 1, "b": 2}}', "the key `b` stands twice"),
    "nan": (b'{"text": NaN}', "`NaN`"),
    "infinity": (b'{"text": -Infinity}', "`-Infinity`"),
    "too large": (b'{"text": 1e999}', "1e999"),
    "too many digits": (b'{"text": ' + b"9" * 5000 + b"}", "too many digits"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8 (byte 0xff)"),
    "latin-1": (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9)"),
    "raw control character": (b'{"text": "a\x00b"}', "control character"),
    "lone surrogate": (SURROGATE, "lone surrogate"),
    "deep": (b'{"text": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper than 64"),
    "very deep": (b"[" * 100_000, "nested deeper than 64"),
    "long": (b'{"text": "' + b"a" * MAX_BYTES + b'"}', "longer than 16 MB"),
}


def read(path: Path) -> list[Row | Problem]:
    return list(read_file(File(path, "data/rows" + path.suffix), Source(path="data")))


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_line_has_its_place_and_its_neighbours_are_read(tmp_path: Path, kind: str) -> None:
    bad, what = MALFORMED[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD)
    first, problem, last = read(path)
    assert isinstance(problem, Problem)
    assert problem.text.startswith("data/rows.jsonl:3:")
    assert what in problem.text
    assert first == Row("data/rows.jsonl:1", {"text": "a"})
    assert last == Row("data/rows.jsonl:4", {"text": "a"})


@pytest.mark.parametrize("kind", sorted(set(MALFORMED) - {"comment", "two objects", "long"}))
def test_a_malformed_element_of_a_list_has_its_line(tmp_path: Path, kind: str) -> None:
    bad, _ = MALFORMED[kind]
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "a"},\n\n' + bad + b"\n]")
    try:
        texts = [item.text for item in read(path) if isinstance(item, Problem)]
    except DataError as error:
        texts = [text for text, _ in error.problems]
    # A value that was opened and not closed is missed at the line where something else comes.
    assert [text for text in texts if text.startswith(("data/rows.json:3:", "data/rows.json:4:"))] == texts != []


def test_the_column_is_the_one_an_editor_shows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'  {"text": x}\n')
    (problem,) = read(path)
    assert isinstance(problem, Problem)
    assert problem.text.startswith("data/rows.jsonl:1:12: not JSON: expecting value")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"data/{name}: no rows in the file"):
        read(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"[]", "no rows"),
        (
            b'{"text": "a"}\n{"text": "b"}',
            "data/rows.json:1: expected a list of objects; a file with one object per line",
        ),
        (b'[\n{"text": "a"}\n{"text": "b"}]', "data/rows.json:3: not JSON: expected `,` or `]`"),
        (b'[\n{"text": "a"}', "data/rows.json:2: not JSON: the list has no end"),
        (b'[{"text": "a"},\n]', "data/rows.json:2: not JSON"),
        (b'[{"text": "a"}]\n]', "data/rows.json:1: more text after the end of the list"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "data/rows.json:2:11: not UTF-8"),
    ],
)
def test_a_broken_list_ends_the_file(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert what in str(caught.value)


def test_elements_of_a_list_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n[\n {"text": "a"}, {"text":\n"b"},\n\n  {"text": "c"} ]\n')
    assert [item.place for item in read(path) if isinstance(item, Row)] == [f"data/rows.json:{n}" for n in (3, 3, 6)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    body = b'{"text": "\xc3\xa9"}' if name == "rows.jsonl" else b'[{"text": "\xc3\xa9"}]'
    path.write_bytes(b"\xef\xbb\xbf" + body + b"\r\n\r\n")
    assert read(path) == [Row(f"data/{name}:1", {"text": "é"})]


def test_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}', encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        read(path)


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c\fd"}, ensure_ascii=False).replace("\\f", "\\f") + "\n")
    assert read(path) == [Row("data/rows.jsonl:1", {"text": "a\u2028b\x85c\fd"})]


def test_texts_stay_texts(tmp_path: Path, write: Callable[..., Path]) -> None:
    row = {"text": "007", "a": "1e5", "b": "NA", "c": "true", "d": "2020-01-01", "e": None, "f": 1.5, "g": "😀"}
    assert read(write(row)) == [Row("data/rows.jsonl:1", row)]


def test_depth_of_64_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ' + "[" * 63 + "]" * 63 + ', "b": "' + "[{" * 100 + '"}')
    assert isinstance(read(path)[0], Row)
    path.write_text('{"text": ' + "[" * 64 + "]" * 64 + "}")
    assert isinstance(read(path)[0], Problem)


def test_the_digest_sees_every_byte(tmp_path: Path, write: Callable[..., Path]) -> None:
    seen = bytearray()
    path = write({"text": "a"}, {"text": "b" * 100})
    list(read_file(File(path, "rows.jsonl", seen.extend), Source(path="data")))
    assert bytes(seen) == path.read_bytes()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data/rows.jsonl: cannot be read: No such file"):
        read(tmp_path / "rows.jsonl")
