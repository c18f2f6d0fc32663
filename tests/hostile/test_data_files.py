"""Files of rows from strangers: every mistake has its line, and text stays text wherever it is shown."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from hostile.attack import Attack

GOOD = json.dumps(tiny_chat.chats(1)[0]).encode() + b"\n"


def with_text(text: str) -> bytes:
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return json.dumps({"messages": said}).encode() + b"\n"


FILES: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("rows.jsonl", GOOD + b"{'a': 1}\n", r"rows.jsonl:2:2: not JSON"),
    "half a row": ("rows.jsonl", GOOD + GOOD[:20], "rows.jsonl:2"),
    "two rows on a line": ("rows.jsonl", GOOD.strip() + GOOD, "more text after the first value"),
    "a list": ("rows.jsonl", b"[1, 2]\n", "expected an object"),
    "NaN": ("rows.jsonl", b'{"text": NaN}\n', "`NaN` is not JSON"),
    "a number beyond all": ("rows.jsonl", b'{"text": 1e999}\n', "is too large"),
    "a number of digits": ("rows.jsonl", b'{"text": ' + b"9" * 100_000 + b"}\n", "too many digits"),
    "a key twice": ("rows.jsonl", b'{"text": "a", "text": "b"}\n', "stands twice"),
    "brackets": ("rows.jsonl", b'{"text": ' + b"[" * 500_000 + b"]" * 500_000 + b"}\n", "nested deeper than 64"),
    "braces": ("rows.jsonl", b'{"a": ' * 5_000 + b"1" + b"}" * 5_000 + b"\n", "nested deeper than 64"),
    "a lone surrogate": ("rows.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
    "no UTF-8": ("rows.jsonl", b'{"text": "\xff\xfe"}\n', "rows.jsonl:1:11: not UTF-8"),
    "overlong UTF-8": ("rows.jsonl", b'{"text": "\xc0\xaf"}\n', "not UTF-8"),
    "UTF-16": ("rows.jsonl", GOOD.decode().encode("utf-16"), "UTF-16"),
    "NULs": ("rows.jsonl", b"\0" * 1000, "rows.jsonl"),
    "a NUL in a line": ("rows.jsonl", GOOD + b'{"text": "a\0b"}\n', "rows.jsonl:2"),
    "nothing": ("rows.jsonl", b"", "no rows"),
    "blank lines": ("rows.jsonl", b"\n" * 100_000, "no rows"),
    "a list without end": ("rows.json", b"[" + GOOD.strip() + b",", "rows.json:1"),
    "a list of lists": ("rows.json", b"[" * 100_000, "nested deeper than 64"),
    "an object for a list": ("rows.json", GOOD, "expected a list of objects"),
    "a quote that never ends": ("rows.csv", b'text\n"' + (b"a,b" * 1000 + b"\n") * 6_000, "more than 16 MB"),
    "a quote in the middle": ("rows.csv", b'text,b\na"b,c\n', "quote inside an unquoted field"),
    "a field more": ("rows.csv", b"text\na,b\n", "2 fields; the header has 1"),
    "columns of one name": ("rows.csv", b"text,text\na,b\n", "two columns are named"),
    "a million columns": ("rows.csv", b"a," * 200_000 + b"\n1\n", "rows.csv:1"),
    "a NUL in a table": ("rows.csv", b"text\na\0b\n", "a NUL character"),
    "no table": ("rows.csv", b"\x80\x04\x95" * 100, "rows.csv"),
    "no gzip": ("rows.jsonl.gz", b"\x1f\x8b" + b"x" * 100, "not a gzip file"),
    "half a gzip": ("rows.jsonl.gz", gzip.compress(GOOD * 1000)[:60], "damaged"),
    "a bomb of one line": ("rows.jsonl.gz", gzip.compress(b"a" * (300 << 20), 1) * 8, "longer than"),
    "a bomb of a list": ("rows.json.gz", gzip.compress(b" " * (100 << 20), 1) * 8, "larger than 512 MB"),
    "no parquet": ("rows.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "not a Parquet file"),
    "a footer without end": ("rows.parquet", b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1", "not a Parquet file"),
    "a footer of noise": (
        "rows.parquet",
        b"PAR1" + bytes(range(256)) * 40 + struct.pack("<I", 10_000) + b"PAR1",
        "not a Parquet file",
    ),
    "a pickle": ("rows.pkl", b"cos\nsystem\n(S'id'\ntR.", "cannot read this kind|no such file"),
    "a script": ("rows.py", b"import os; os.system('id')\n", "rows.py"),
    "a script of its own": ("rows/rows.py", b"import os; os.system('id')\n", "no file of rows"),
    "a role of its own": ("rows.jsonl", b'{"messages": [{"role": "\\u001b[2J", "content": "a"}]}\n', "role"),
    "a message that is none": ("rows.jsonl", b'{"messages": [[1]]}\n', "messages"),
    "messages of nothing": ("rows.jsonl", b'{"messages": []}\n', "messages"),
    "a text that is none": ("rows.jsonl", b'{"text": {"__class__": "evil"}}\n', "text"),
    "keys of escapes": ("rows.jsonl", b'{"\\u001b]0;x\\u0007": 1}\n', "rows.jsonl"),
    "a key of a megabyte": ("rows.jsonl", b'{"' + b"k" * (1 << 20) + b'": 1}\n', "rows.jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused(name: str, attack: Attack):
    file, content, telling = FILES[name]
    attack.rows()
    attack.write(file, content)
    attack.recipe(dataset={"train": file.split("/")[0]})
    attack.refused("train", "recipe.yaml", telling=telling, within=5.0, swelling=900)


@pytest.mark.parametrize("size", [200 << 20, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_line_of_a_gigabyte(size: int, attack: Attack):
    with attack.write("rows.jsonl", GOOD + b'{"text": "').open("r+b") as file:
        file.truncate(size)
    attack.recipe(dataset={"train": "rows.jsonl"})
    attack.refused("train", "recipe.yaml", telling="rows.jsonl:2: the line is longer than", swelling=100)


def test_a_file_without_end(attack: Attack):
    (attack.work / "rows.jsonl").symlink_to("/dev/zero")
    attack.recipe(dataset={"train": "rows.jsonl"})
    attack.refused("train", "recipe.yaml", telling="rows.jsonl", swelling=100)


def parquet(path: Path, **changes: Any) -> None:
    """A table, with bytes of its footer changed: counts that are not there."""
    import pyarrow
    from pyarrow import parquet as files

    files.write_table(pyarrow.table({"text": [f"row {number}" for number in range(8)]}), path)
    data = bytearray(path.read_bytes())
    for place, value in changes.items():
        data[int(place.removeprefix("at"))] = value
    path.write_bytes(data)


@pytest.mark.slow
def test_no_byte_of_a_table_matters(attack: Attack):
    attack.rows()
    attack.recipe(dataset={"train": "rows.parquet"})
    parquet(attack.work / "rows.parquet")
    size = (attack.work / "rows.parquet").stat().st_size
    for place in range(4, size, 7):
        parquet(attack.work / "rows.parquet", **{f"at{place}": 255})
        attack.harmless("data", "recipe.yaml", code=None)


def test_a_table_of_many_rows_that_are_not_there(attack: Attack):
    attack.rows()
    attack.recipe(dataset={"train": "rows.parquet"})
    parquet(attack.work / "rows.parquet")
    data = (attack.work / "rows.parquet").read_bytes()
    # num_rows is a varint of thrift, 8 rows: 0x16 0x10 (field 3, i64)
    spoilt = data.replace(b"\x16\x10", b"\x16\x7e")
    assert spoilt != data
    (attack.work / "rows.parquet").write_bytes(spoilt)
    attack.refused("train", "recipe.yaml", telling="rows.parquet: damaged")


# What a terminal would obey


ESCAPES = {
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;evil\x07",  # OSC 0
    "link": "\x1b]8;;https://evil\x1b\\click\x1b]8;;\x1b\\",  # OSC 8
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",  # OSC 52
    "C1": "\x9b31m\x9d0;evil\x9c",
    "direction": "\u202eevil\u202c\u2066x\u2069",
    "markup": "[link=https://evil]x[/link][/b][red]",
    "backspace": "good\b\b\b\bevil\r",
    "bell": "\x07\x7f",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_row_is_shown_and_not_obeyed(name: str, attack: Attack):
    evil = ESCAPES[name]
    shutil.copytree(attack.base, attack.work / "base")
    path = attack.work / "base" / "tokenizer.json"  # one that has these characters
    described = json.loads(path.read_text())
    number = len(described["model"]["vocab"])
    for sign in sorted(set(evil) - set(described["model"]["vocab"])):
        described["model"]["vocab"].pop(chr(32 + 91 - (number := number - 1) % 40), None)
        described["model"]["vocab"][sign] = number
    path.write_text(json.dumps(described))
    attack.rows([json.loads(with_text(evil))])
    attack.recipe(base="base")
    seen = attack.harmless("data", "recipe.yaml", terminal=True, code=None)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen.out)  # what rich itself writes
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain), plain
    assert "\x1b[31mred" not in seen.out
    assert "\x1b[2J" not in seen.out


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        "</pre></body><script src=//evil>",
        "<img src=x onerror=alert(1)>",
        '" onmouseover="alert(1)',
        "{{ 7 * 7 }}{% raw %}",
        "\x1b]8;;https://evil\x07",
        "\u202eevil",
        "javascript:alert(1)",
    ],
)
def test_a_page_runs_nothing(evil: str, attack: Attack):
    # one token a text, so that it comes out whole
    shutil.copytree(attack.base, attack.work / "base")
    path = attack.work / "base" / "tokenizer.json"
    described = json.loads(path.read_text())
    described["added_tokens"].append(
        {"id": 95, "content": evil, "special": False}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    )
    described["model"]["vocab"] = {k: v for k, v in described["model"]["vocab"].items() if v != 95} | {evil: 95}
    path.write_text(json.dumps(described))
    attack.write("rows.jsonl", with_text(evil) + GOOD)
    attack.recipe(base="base")
    attack.harmless("data", "recipe.yaml", "--html", "page.html", code=None, writes=["."])
    page = (attack.work / "page.html").read_text()
    body = page.partition("</style>")[2]
    assert "<script" not in page
    assert "<img" not in body
    assert 'onmouseover="alert' not in body
    assert "default-src 'none'" in page
    assert not re.search("[\x1b\u202e]", page)
    assert "49" not in re.findall(r"7 \* 7|49", body)[:1]


def test_special_tokens_of_a_row_are_text(attack: Attack):
    evil = "<eos><bos>a:I am <pad><unk>"
    attack.rows([json.loads(with_text(evil)), *tiny_chat.chats(3)])
    attack.recipe()
    seen = attack.harmless("data", "recipe.yaml", "--json", "--rows", "1")
    found = json.loads(seen.out)
    [sample] = [one for one in found["samples"] if one["place"].endswith(":1")]
    special = [token["text"] for token in sample["text"] if token["special"]]
    assert special.count("<eos>") == 2  # those of the template
    assert special.count("<bos>") == 2
    assert "<pad>" not in special


# Pictures that rows name


PICTURES: dict[str, tuple[str, str]] = {
    "metadata of a cloud": ("http://169.254.169.254/latest/meta-data/iam", "not fetched|no such file"),
    "a server": ("https://evil.example/a.png", "no such file|not fetched"),
    "a file by its address": ("file:///etc/passwd", "no such file|not fetched"),
    "above": ("../outside/secret.png", "does not lie below"),
    "above by a detour": ("pictures/../../outside/secret.png", "does not lie below"),
    "absolute": ("/etc/passwd", "does not lie below"),
    "a home": ("~/secret.png", "no such file|does not lie below"),
    "a link": ("pictures/link.png", "does not lie below"),
    "a device": ("pictures/zero.png", "does not lie below|no such file"),
    "a NUL": ("a\0b.png", "no such file|cannot"),
    "a name of a kilobyte": ("x" * 5000, "no such file"),
    "no picture": ("pictures/text.png", "not a picture"),
    "a bomb": ("pictures/bomb.png", "pixels, more than|not a picture"),
    "a program": ("pictures/evil.eps", "not a picture"),
}


@pytest.fixture
def pictures(attack: Attack) -> Callable[[str], None]:
    """Writes a row that names a picture, and what hostile rows name."""
    import zlib

    folder = attack.work / "pictures"
    folder.mkdir()
    (attack.outside / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (folder / "link.png").symlink_to(attack.outside / "secret.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "text.png").write_text("no picture")
    (folder / "evil.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch pwned) system\n")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)))

    def write(name: str) -> None:
        attack.rows([{"image": name, "text": "a cat"}])
        attack.recipe(trainer={"task": "captioning"})

    return write


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_refused(name: str, attack: Attack, pictures: Callable[[str], None]):
    image, telling = PICTURES[name]
    pictures(image)
    attack.refused("train", "recipe.yaml", telling=telling, within=4.0)
    assert not (attack.work / "pwned").exists()
