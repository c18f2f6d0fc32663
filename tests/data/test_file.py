from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.data import file as files
from peftctl.data.dataset import Source
from peftctl.data.file import File, Row
from peftctl.data.sources import PACKED, read, read_file
from peftctl.errors import DataError, Problem

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=4), ascii=st.booleans())
def test_any_json_that_python_writes_comes_back(tmp_path: Path, rows: list[dict[str, Any]], ascii: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode())
    (tmp_path / "a.json").write_bytes(f"[{', '.join(lines)}]".encode())
    for name, places in (("a.jsonl", range(1, 9)), ("a.json", [1] * 9)):
        found = list(read_file(File(tmp_path / name, name), Source(path=name)))
        assert found == [Row(f"{name}:{place}", row) for place, row in zip(places, rows, strict=False)]


CONTENT = {
    ".jsonl": '{"text": "é"}\n{"text": "b"}\n',
    ".json": '[{"text": "é"},\n{"text": "b"}]',
    ".csv": "text,label\né,0\nb,1\n",
    ".tsv": "text\tlabel\né\t0\nb\t1\n",
    ".txt": "é\nb\n",
    ".md": "# é\n\nb\n",
}


@pytest.mark.parametrize("suffix", PACKED)
def test_a_packed_file_has_the_rows_and_the_digest_of_the_plain_one(tmp_path: Path, suffix: str) -> None:
    content = CONTENT[suffix.removesuffix(".gz")].encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content[:9]) + gzip.compress(content[9:]))
    (tmp_path / f"a{suffix.removesuffix('.gz')}").write_bytes(content)
    seen, plain = bytearray(), bytearray()
    rows = list(read(Source(path=f"a{suffix}"), tmp_path, seen.extend))
    expected = list(read(Source(path=f"a{suffix.removesuffix('.gz')}"), tmp_path, plain.extend))
    assert [item[1] for item in rows] == [item[1] for item in expected]
    assert seen == plain == content
    assert len(rows) == (1 if suffix in (".txt.gz", ".md.gz") else 2)


def test_a_list_is_read_whole_and_so_is_not_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_WHOLE", 2**20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * 2**20))
    with pytest.raises(DataError, match=r"^a.json.gz: larger than 1 MB; one object per line in a `.jsonl` file"):
        list(read(Source(path="a.json.gz"), tmp_path))


LINE = "word " * 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'{{"text": "{LINE}"}}\n' * 40_000),
        ("a.jsonl.gz", f'{{"text": "{LINE}"}}\n' * 40_000),
        ("a.csv", "id,text\n" + f'1,"{LINE}\n{LINE}"\n' * 40_000),
        ("a.txt", f"{LINE}\n" * 40_000),
    ],
)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, name: str, content: str) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    source = Source(path=name, sample_by="line" if name == "a.txt" else "document")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(source, tmp_path)) == 40_000
        assert tracemalloc.get_traced_memory()[1] < 2**20 < len(data) / 3
    finally:
        tracemalloc.stop()


PIECES = [
    b'"',
    b",",
    b"\t",
    b"\n",
    b"\r",
    b"\r\n",
    b"a",
    b" ",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b'{"a": "b"}',
    b"\\u",
    b"1e9",
]


@pytest.mark.parametrize("suffix", CONTENT)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=120)
@given(content=st.lists(st.sampled_from([*PIECES, b"\xe9", b"\0", b"\xef\xbb\xbf"]), max_size=24).map(b"".join))
def test_no_bytes_break_a_reader(tmp_path: Path, suffix: str, content: bytes) -> None:
    """There are rows, mistakes of rows, and mistakes of files, each with its place; what is read twice is the same."""
    (tmp_path / f"a{suffix}").write_bytes(content)

    source = Source(path=f"a{suffix}", sample_by="line" if suffix in (".txt", ".md") else "document")

    def met() -> list[Row | Problem]:
        found: list[Row | Problem] = []
        try:
            for item in read(source, tmp_path):
                found.append(item)
        except DataError as error:
            found += error.problems
        return found

    found = met()
    assert found
    assert found == met()
    assert all(item[0].startswith(f"a{suffix}:") for item in found)
    lines = [int(item.place.split(":")[1]) for item in found if isinstance(item, Row)]
    assert lines == sorted(lines)
    assert not lines or lines[-1] <= content.count(b"\n") + 1
