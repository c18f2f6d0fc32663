"""Files that a CI server reads: well-formed whatever stands in names and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from peftctl.errors import StorageError
from peftctl.evaluation import rows_file
from peftctl.evaluation.gate import Gate
from peftctl.evaluation.judge import Verdict, judged
from peftctl.evaluation.junit import junit
from peftctl.evaluation.report import Table, in_words, markdown, short, tables
from peftctl.evaluation.sheet import Figure, Sheet

EVIL = '<b>&"\x1b[31m|`x`\n](http://x)\ud800'


def hits(right: int, rows: int = 100) -> Any:
    return np.stack([np.arange(rows) < right, np.ones(rows)], axis=1).astype(float)


@pytest.fixture
def sheet() -> Sheet:
    found = {"base": {"accuracy": hits(50)}, "adapter": {"accuracy": hits(60)}, EVIL: {"accuracy": hits(95)}}
    return Sheet(rows=[f"{i:032x}" for i in range(100)], statistics=found)


@pytest.fixture
def verdicts(sheet: Sheet) -> list[Verdict]:
    gates = {"accuracy": Gate(min=0.55), "hard/accuracy": Gate(max_drop=0.1, against=EVIL)}
    return judged({"hard": sheet}, gates, "adapter")


def test_junit_has_a_case_for_every_limit(verdicts: list[Verdict]):
    from lxml import etree

    content = junit(verdicts, f"peftctl eval {EVIL}", "2026-01-01T00:00:00+00:00", 1.5)
    schema = etree.XMLSchema(etree.parse(Path(__file__).parent / "junit.xsd"))
    schema.assertValid(etree.fromstring(content))
    [suite] = ElementTree.fromstring(content)
    assert (suite.get("tests"), suite.get("failures"), suite.get("timestamp")) == ("2", "1", "2026-01-01T00:00:00")
    passed, failed = suite.findall("testcase")
    assert passed.get("name") == "hard/accuracy min 0.55"
    assert passed.find("failure") is None
    assert "\x1b" not in content.decode()
    [failure] = failed.findall("failure")
    assert "lies beyond the limit 0.1" in str(failure.get("message"))
    assert '<b>&"' in str(failed.get("name"))
    assert failed.get("classname") == "gates.hard"


def test_junit_without_gates():
    [suite] = ElementTree.fromstring(junit([], "eval", "2026-01-01T00:00:00+00:00", 0))
    assert suite.get("tests") == "0"
    assert len(suite) == 0


def test_markdown_shows_texts_as_they_are(sheet: Sheet, verdicts: list[Verdict]):
    samples = {
        "hard": [{"question": [{"role": "user", "content": EVIL}], "answer": "x|y", "base": "", "adapter": "*z*"}]
    }
    confusions = {"hard": {"adapter": {"labels": ["a|b", "c"], "counts": [[1, 2], [3, 4]]}}}
    text = markdown(tables({"hard": sheet}, verdicts, confusions, samples, ["base", "adapter"]))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert html.count("<table>") == 4
    assert "<b>" not in html
    assert "<a " not in html
    assert "<code>" not in html
    assert "<em>" not in html
    assert "<td>x|y</td>" in html
    assert "<td>60.0% [" in html
    assert "\x1b" not in html
    assert html.count("<tr>") == 3 + 3 + 2 + 3


def test_figures_for_a_person():
    known, unknown = (0.9, 0.95), (-np.inf, np.inf)
    assert in_words("accuracy", Figure(0.9267, known)) == "92.7% [90.0, 95.0]"
    assert in_words("accuracy", Figure(-0.02, (-0.05, 0.01)), signed=True) == "-2.0% [-5.0, +1.0]"
    assert in_words("loss", Figure(1.23456, known)) == "1.235 [0.9, 0.95]"
    assert in_words("bleu", Figure(31.25, unknown)) == "31.25"
    assert len(short("x" * 1000)) == 200


def test_a_table_without_rows_is_one():
    assert "| a | b |\n| --- | --- |" in markdown([Table("t", ["a", "b"], [])])


def test_statistics_come_back_as_they_went(sheet: Sheet, tmp_path: Path):
    (tmp_path / "rows.npz").write_bytes(rows_file.packed({"hard": sheet, "": sheet}))
    back = rows_file.read(tmp_path / "rows.npz")
    assert list(back) == ["hard", ""]
    for one in back.values():
        assert list(one.rows) == list(sheet.rows)
        assert list(one.statistics) == list(sheet.statistics)
        for model, found in sheet.statistics.items():
            np.testing.assert_array_equal(one.statistics[model]["accuracy"], found["accuracy"])


def test_damaged_statistics_are_refused_and_nothing_is_run(sheet: Sheet, tmp_path: Path):
    path = tmp_path / "rows.npz"
    whole = rows_file.packed({"": sheet})
    for content in (b"", b"no zip", whole[:200], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(StorageError, match="damaged"):
            rows_file.read(path)
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    np.savez(path, names=np.array(['["x"]']), **{"array-0": np.array([Evil()], dtype=object)})
    with pytest.raises(StorageError, match="damaged"):
        rows_file.read(path)
    assert not ran.exists()
