"""The page of `peftctl data`, from what its verb found to the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from cli.terminal import Terminal
from rich.cells import cell_len

from peftctl.cli.console import out_page
from peftctl.cli.data_html import document
from peftctl.cli.data_page import MOST, RUN, page
from peftctl.cli.screen import screen


def tokens(*texts: str, trained: bool = False, special: bool = False) -> list[dict[str, Any]]:
    return [{"ids": [7], "text": text, "trained": trained, "special": special} for text in texts]


def found(*text: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the verb would give for one row of these tokens."""
    trained = sum(token["trained"] for token in text)
    sample = {"row": 0, "place": "rows.jsonl:1", "why": "first", "tokens": len(text), "trained": trained, "cut": 0}
    return {
        "set": "train",
        "ok": False,
        "model": "tiny",
        "task": "sft",
        "labels": [],
        "formats": ["messages"],
        "chat_template": "tokenizer",
        "train_on": "assistant",
        "stop_tokens": [{"id": 2, "text": "<eos>"}],
        "pad_token": {"id": 0, "text": "<pad>"},
        "ledger": {"read": 3, "kept": 1, "truncated": 0, "split": 0, "dropped": 1, "skipped": 1, "tokens_cut": 0},
        "rows": 1,
        "tokens": len(text),
        "trained_tokens": trained,
        "lengths": {
            **{"min": 1, "median": 1, "p95": 1, "max": 1, "max_length": 9, "at_max_length": 0},
            "histogram": [{"from": 1, "to": 1, "rows": 1}],
        },
        "padding": {"padded": 0.25, "packed": 0},
        "checks": [
            {"name": "stop tokens", "state": "failed", "text": "`x` and so on " * 9, "hint": "do", "places": ["a:1"]},
            {"name": "leaks", "state": "ok", "text": "no row of `eval` is trained", "hint": None, "places": []},
        ],
        "samples": [{**sample, "problem": None, "text": list(text)}],
        **more,
    }


def drawn(result: dict[str, Any], width: int = 80) -> Terminal:
    """The page on a terminal."""
    terminal = Terminal()
    console = screen(terminal, width=width, force_terminal=True, color_system="standard")
    for line in page(result, console):
        console.print(line, soft_wrap=True)
    return terminal


ROW = [
    *tokens("<bos>", special=True),
    *tokens("Why? ", "日本語" * 30, "\n", "\n\ttab"),
    *tokens("be", "cause " * 40, trained=True),
    *tokens("<eos>", trained=True, special=True),
    *tokens("\n"),
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_page_fits_the_terminal(width):
    lines = drawn(found(*ROW), width).screen().splitlines()
    assert max(map(cell_len, lines)) <= width
    whole = "".join(line[4:] for line in lines if line.startswith("  │ "))
    assert "日本語" * 30 in whole
    assert whole.replace(" ", "").endswith("cause" * 40 + "<eos>⟧↵")
    assert whole.count("⟦") == whole.count("⟧") == 1
    assert "3 read, 1 kept, 1 dropped, 1 skipped" in " ".join(" ".join(lines).split())


def test_trained_and_masked_are_apart_by_colour_and_by_another_sign():
    ansi = drawn(found(*tokens("masked"), *tokens("trained", trained=True))).getvalue()
    assert "\x1b[2mmasked" in ansi
    assert "\x1b[4;92mtrained" in ansi  # underlined, and green
    assert "⟧" in ansi


def test_what_is_wrong_comes_last_and_text_goes_below_on_a_narrow_terminal():
    lines = drawn(found(*ROW), 40).screen().splitlines()
    assert lines.index("ok       leaks") < lines.index("failed   stop tokens")
    assert lines[-2:] == ["  a:1", "  hint: do"]


def test_long_rows_are_shortened_and_say_so():
    row = [*tokens(*["a"] * (RUN + 1)), *tokens(*["b"] * RUN, trained=True), *tokens("<eos>")]
    text = drawn(found(*row)).screen()
    assert "… 41 more …" in text
    assert text.count("b") >= RUN
    turns = [part for _ in range(9) for part in (*tokens(*"abcdefgh" * 12), *tokens(*"xyz" * 12, trained=True))]
    assert f"… {len(turns) - MOST} more …" in drawn(found(*turns)).screen()
    assert document(found(*row)).count('title="7"') == len(row)  # the file has all of them


def test_nothing_that_a_terminal_would_obey(capsys):
    row = tokens("\x1b[31mred\x07\u202e", "a\rb")
    out_page(page(found(*row, model="\x1b]0;title\x07"), console := screen(io.StringIO())), console)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31mred\\x07\\u202ea\\rb" in out


def test_an_encoding_without_signs(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    on = screen(stream)
    out_page(page(found(*tokens("é\n", trained=True)), on), on)
    assert "  | [[\\xe9\\n\n  | ]]\n" in stream.buffer.getvalue().decode("ascii")


def test_no_rows():
    nothing = found(rows=0, ledger=None, lengths=None, padding=None, samples=[], stop_tokens=[])
    assert "none can be used" in drawn(nothing).screen()
    assert "none can be used" in document(nothing)
