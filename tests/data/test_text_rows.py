from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftctl.data.file import File, Row
from peftctl.data.text_rows import samples

PROSE = b"\xef\xbb\xbf\r\nOne \xc3\xa9\r\n  two\r\n \t\r\n\r\nthree\x0bfour\n\n"


@pytest.mark.parametrize(
    ("sample_by", "rows"),
    [
        ("document", {1: "\nOne é\n  two\n \t\n\nthree\x0bfour\n\n"}),
        ("paragraph", {2: "One é\n  two", 6: "three\x0bfour"}),
        ("line", {2: "One é", 3: "  two", 6: "three\x0bfour"}),
    ],
)
def test_a_row_is_what_sample_by_says(tmp_path: Path, sample_by: Any, rows: dict[int, str]) -> None:
    (tmp_path / "a.txt").write_bytes(PROSE)
    found = list(samples(File(tmp_path / "a.txt", "a.txt"), sample_by))
    assert found == [Row(f"a.txt:{line}", {"text": text}) for line, text in rows.items()]


@pytest.mark.parametrize("sample_by", ["document", "paragraph"])
def test_a_mistake_is_the_samples(tmp_path: Path, sample_by: Any) -> None:
    """One bad byte makes one bad row, however many there are."""
    (tmp_path / "a.txt").write_bytes(b"a\n\xff\nb\n\xff\n\nc\n")
    found = list(samples(File(tmp_path / "a.txt", "a.txt"), sample_by))
    assert found[0][0] == "a.txt:2:1: not UTF-8 (byte 0xff)"
    assert found[1:] == ([] if sample_by == "document" else [Row("a.txt:6", {"text": "c"})])
