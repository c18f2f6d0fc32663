"""The account of rows: it adds up, and reasons are shared words."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.data.dataset import Dataset
from peftctl.data.fitting import Encoded
from peftctl.data.held_out import hold_out
from peftctl.data.ledger import Ledger, Tally, settle, tell
from peftctl.data.mistakes import Mistakes, reason
from peftctl.data.prepare import prepare
from peftctl.errors import DataError, Problem


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("a.jsonl:3: `messages` is missing", "`messages` is missing"),
        ("a.jsonl:3:17: not JSON: expected `,` or `]`, got `\x07`", "not JSON: expected `...` or `...`, got `...`"),
        ("a.parquet:row 12: text: is empty", "text: is empty"),
        ("org/set[train]:5: messages[3].role: unknown role `usr`", "messages[...].role: unknown role `usr`"),
        ("C:/x: y/a.csv:12: 3 fields, the header has 1,200", "N fields, the header has N"),
        ("nothing like a place", "nothing like a place"),
    ],
)
def test_reasons_have_no_place_and_no_own_words(text, shared):
    assert reason(Problem(text)) == shared


def test_a_tally_adds_up():
    tally = Tally()
    whole = Encoded(array("i", range(9)), ((1, 9),))
    tally.keep([whole])
    tally.keep([Encoded(array("i", range(4)), ((1, 3),), truncated=True, cut=6)])
    tally.keep([Encoded(array("i", range(4)), ((1, 4),), piece=i, pieces=3, cut=2 * (i == 0)) for i in (0, 2)])
    tally.drop()
    for line in (1, 2):
        tally.skip([Problem(f"a:{line}: text: is empty"), Problem("more")])
    assert tally.ledger == Ledger(
        read=6,
        kept=3,
        truncated=1,
        split=1,
        pieces=2,
        dropped=1,
        skipped=2,
        tokens=21,
        trained_tokens=16,
        tokens_cut=8,
        reasons={"text: is empty": 2},
    )
    assert tally.ledger.sequences == 4
    twice = tally.ledger + tally.ledger
    assert (twice.read, twice.tokens, twice.reasons) == (12, 42, {"text: is empty": 4})
    assert tally.ledger.left_out == Ledger(read=3, dropped=1, skipped=2, reasons={"text: is empty": 2})


def test_it_is_told_in_a_line_and_one_for_every_reason():
    said: list[str] = []
    tell("a", Ledger(read=1200, kept=1200), Dataset(train="a"), said.append)
    assert said == ["a: 1,200 rows read, all kept"]
    said.clear()
    reasons = {f"reason {chr(97 + i)}": 8 - i for i in range(8)}
    skipped = sum(reasons.values())
    numbers: dict[str, Any] = {"kept": 5, "truncated": 2, "dropped": 1, "tokens_cut": 3_000}
    full = Ledger(read=6 + skipped, skipped=skipped, reasons=reasons, **numbers)
    tell("a", full, Dataset(train="a"), said.append)
    assert said == [
        "a: 42 rows read, 5 kept; 2 cut to `max_length` 2,048 tokens, 1 longer than `max_length` 2,048 dropped, "
        "36 skipped, 3,000 tokens lost",
        *(f"skipped {8 - i}: reason {chr(97 + i)}" for i in range(5)),
        "skipped 6 for 3 other reasons",
    ]


def test_too_much_left_out_is_an_error_and_so_is_everything():
    mistakes = Mistakes()
    mistakes.add([Problem("a:7: text: is empty")])
    some = Ledger(read=100, kept=98, dropped=1, skipped=1, reasons={"text: is empty": 1})
    settle(some, Dataset(train="a", max_skipped=0.02), mistakes)
    with pytest.raises(DataError, match="2 of 100 rows left out") as caught:
        settle(some, Dataset(train="a"), mistakes)
    assert caught.value.problems[0].text == "a:7: text: is empty"
    with pytest.raises(DataError, match="no row is left"):
        settle(Ledger(read=1, dropped=1), Dataset(train="a", max_skipped=1), mistakes)


ROWS = st.lists(
    st.one_of(
        st.integers(1, 60).map(lambda words: json.dumps({"text": "word " * words})),
        st.sampled_from(['{"text": ""}', '{"text": 3}', '{"txt": "a"}', "{broken", "[]", '{"text": null}', ""]),
    ),
    min_size=3,
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, on_long=st.sampled_from(["truncate", "split", "drop", "error"]), length=st.integers(2, 40))
def test_every_row_is_accounted_for(tmp_path: Path, tokenizer_of: Any, rows, on_long, length):
    (tmp_path / "rows.jsonl").write_text("\n".join(['{"text": "first"}', *rows]))
    options = {"max_length": length, "on_long": on_long, "on_bad_row": "skip", "max_skipped": 1.0}
    try:
        dataset = Dataset(train="rows.jsonl", **options)
        prepared = prepare("rows.jsonl", dataset, tokenizer_of("chatml"), tmp_path)
    except DataError as error:
        told = str(error)
        assert "no row is left" in told
        return
    ledger = prepared.ledger
    assert ledger.read == 1 + sum(row != "" for row in rows) == ledger.kept + ledger.dropped + ledger.skipped
    assert ledger == prepared.sources["rows.jsonl"]
    assert ledger.sequences == len(prepared.rows)
    assert ledger.tokens == sum(prepared.lengths)
    assert ledger.trained_tokens == sum(row.trained for row in prepared.rows)
    if ledger.kept > 1:
        train, held = hold_out(prepared, 0.3, seed=0)
        assert train.ledger + held.ledger == ledger
