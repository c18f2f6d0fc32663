from __future__ import annotations

import io
import sys

import pytest
from cli.terminal import Terminal
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from peftctl.cli import console
from peftctl.cli.layout import aligned, message, table
from peftctl.cli.screen import screen

ORDERS = {chr(code) for code in [*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]}


@given(st.text())
def test_clean_text_gives_a_terminal_no_orders(text):
    assert not ORDERS - {"\n", "\t"} & set(console.clean(text))
    assert not ORDERS & set(console.one_line(text))
    console.clean(text).encode("utf-8")


def test_clean_text_keeps_what_people_write():
    text = "naïve 漢字 العربية 👩‍👩‍👧 a\tb\nc"
    assert console.clean(text) == text
    assert console.clean("\x1b[31m\x00\x9b\u202e\udcff\r") == "\\x1b[31m\\x00\\x9b\\u202e\\udcff\\r"


def test_output_is_cleaned_for_a_terminal_alone(monkeypatch, capsys):
    console.out("a\x1b[31m\nb")
    assert capsys.readouterr().out == "a\x1b[31m\nb\n"
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    console.out("a\x1b[31m\nb")
    assert terminal.getvalue() == "a\\x1b[31m\nb\n"


def test_json_is_ascii(capsys):
    console.out_json({"é": "\x9b\u202e", "n": [float("nan"), -float("inf"), 1.5]})
    said = capsys.readouterr().out
    assert said.isascii()
    assert said == '{\n  "\\u00e9": "\\u009b\\u202e",\n  "n": [\n    "nan",\n    "-inf",\n    1.5\n  ]\n}\n'


def told(*lines: Text, width: int, **settings: object) -> str:
    terminal = Terminal()
    console.tell(*lines, on=screen(terminal, width=width, **settings))
    return terminal.getvalue()


def test_words_are_not_cut_on_a_terminal():
    lines = message("error", "a message of rather many words, in `/a/very/long/path/that/fits/no/line`", "mend it")
    assert told(*lines, width=30, color_system=None) == (
        "error: a message of rather\n  many words, in\n  `/a/very/long/path/that/fits/no/line`\n  hint: mend it\n"
    )


def test_lines_are_whole_where_there_is_no_terminal():
    stream = io.StringIO()
    console.tell(*message("error", "word " * 50, None), on=screen(stream))
    assert stream.getvalue().count("\n") == 1


def test_colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    lines = message("error", "x", "y `z`")
    assert told(*lines, width=80) == "\x1b[1;31merror: \x1b[0mx\n  \x1b[1;36mhint: \x1b[0my \x1b[1m`z`\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in told(*lines, width=80)
    monkeypatch.setenv("TERM", "dumb")
    assert told(*lines, width=80) == "error: x\n  hint: y `z`\n"


@pytest.mark.parametrize("columns", [30, 40, 80])
def test_rows_stay_in_their_column(columns):
    rows = [("model", "some/model, bfloat16 on cpu"), ("output", "runs/" + "x" * 60), ("seed", "")]
    lines = list(aligned(rows, columns))
    assert {len(label) for label, _ in lines} == {8}
    assert max(len(label + value) for label, value in lines) <= columns
    assert "".join(value for _, value in lines).replace(" ", "") == "".join(v for _, v in rows).replace(" ", "")


def test_rows_are_whole_where_nobody_says_how_wide():
    assert list(aligned([("a", "x " * 100)], None)) == [("a  ", ("x " * 100).strip())]


def test_numbers_stand_right_and_words_left():
    stream = io.StringIO()
    rows = [["loss", "2.10", "0.1"], ["accuracy", "75.2 %", "-"], ["[b]x\x1b", "1e-05", "12,000"]]
    console.show(table(["metric", "base", "adapter"], rows), screen(stream))
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "metric       base   adapter",
        "loss         2.10       0.1",
        "accuracy   75.2 %         -",
        "[b]x\\x1b    1e-05    12,000",
    ]


def test_a_hint_that_errors_in_a_row_share_is_told_once(capsys):
    from peftctl.cli import console
    from peftctl.errors import Problem

    console.complain([Problem("a", "x"), Problem("b", "x"), Problem("c", "y"), Problem("d"), Problem("e", "x")])
    said = capsys.readouterr().err.split("\n")
    assert said == [
        "error: a",
        "error: b",
        "  hint: x",
        "error: c",
        "  hint: y",
        "error: d",
        "error: e",
        "  hint: x",
        "",
    ]
