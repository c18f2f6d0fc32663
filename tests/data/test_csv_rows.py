from __future__ import annotations

import csv
import io
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.data.csv_rows import records
from peftctl.data.file import File, Row
from peftctl.errors import DataError, Problem

NUL_AND_HALVES = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
TEXTS = st.text(st.one_of(st.sampled_from(',\t"\r\n; '), NUL_AND_HALVES), max_size=12)


def read(tmp_path: Path, content: bytes, delimiter: str = ",") -> list[Row | Problem]:
    path = tmp_path / "rows"
    path.write_bytes(content)
    return list(records(File(path, "rows"), delimiter))


@pytest.mark.parametrize("delimiter", [",", "\t"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.lists(TEXTS, min_size=3, max_size=3), max_size=6), quoting=st.sampled_from([0, 1]))
def test_any_texts_that_python_writes_come_back(
    tmp_path: Path, delimiter: str, rows: list[list[str]], quoting: int
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([["a", "b", "c"], *rows])
    found = read(tmp_path, file.getvalue().encode(), delimiter)
    assert [list(item.value.values()) for item in found if isinstance(item, Row)] == rows
    assert len(found) == len(rows)
    lines = file.getvalue().split("\n")
    for item, row in zip(found, rows, strict=True):  # the place is the line that the row starts at
        start = io.StringIO(newline="")
        csv.writer(start, delimiter=delimiter, quoting=quoting).writerow(row)
        assert lines[int(item[0].split(":")[1]) - 1] == start.getvalue().split("\n")[0]


def test_fields_stay_the_texts_they_are(tmp_path: Path) -> None:
    values = ["007", "NA", "", "null", "1e5", "True", "2020-01-01", " a ", "NaN", "'", "é"]
    content = "\ufeff" + ",".join("abcdefghijk") + "\r\n" + ",".join(values) + "\r\n\r\n"
    assert read(tmp_path, content.encode()) == [Row("rows:2", dict(zip("abcdefghijk", values, strict=True)))]


def test_blank_lines_are_no_rows_and_quoted_ones_are(tmp_path: Path) -> None:
    found = read(tmp_path, b'text\n\n""\n\n"a\n\nb"\n\nc')
    assert found == [Row("rows:3", {"text": ""}), Row("rows:5", {"text": "a\n\nb"}), Row("rows:9", {"text": "c"})]


def test_a_quote_inside_a_tab_separated_field_is_a_character(tmp_path: Path) -> None:
    (row,) = read(tmp_path, b'text\tlabel\n5" of "it"\t"a ""b"""\n', "\t")
    assert row == Row("rows:2", {"text": '5" of "it"', "label": 'a "b"'})


def test_a_long_field(tmp_path: Path) -> None:
    """Python's own limit is 128 KiB a field."""
    long = "a" * 2**20
    assert read(tmp_path, f"text,label\n{long},0\n".encode()) == [Row("rows:2", {"text": long, "label": "0"})]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(
    st.lists(
        st.lists(st.sampled_from(['"', '""', ",", "\r\n", "\n", "a", "bc", " "]), max_size=8).map("".join), max_size=6
    )
)
def test_a_row_that_is_read_is_one_that_python_reads_too(tmp_path: Path, lines: list[str]) -> None:
    """What stands in a file with mistakes is never read as something else than Python's own lenient reading of it."""
    content = "text,label\n" + "\n".join(lines)
    (tmp_path / "rows").write_text(content, newline="")
    met: list[Row | Problem] = []
    with suppress(DataError):
        for item in records(File(tmp_path / "rows", "rows"), ","):
            met.append(item)  # those before a mistake of the file, too
    reader = csv.reader(io.StringIO(content, newline=""))
    rows, before = {}, 0
    for fields in reader:
        rows[f"rows:{before + 1}"], before = fields, reader.line_num
    for item in met:
        if isinstance(item, Row):
            assert list(item.value.values()) == rows[item.place]
        else:
            assert item.text.split(": ")[0] in rows
