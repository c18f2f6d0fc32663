"""Rows of a recipe: what `eval.max_rows` leaves."""

from __future__ import annotations

from pathlib import Path

import tiny_chat

from peftctl.data.dataset import Dataset
from peftctl.data.prepare import prepare
from peftctl.verbs.rows import first


def test_the_first_rows_come_with_all_their_pieces(tmp_path: Path):
    rows = [{"text": "word " * (3 + 20 * (i % 2))} for i in range(6)]
    tiny_chat.write_rows(tmp_path / "rows.jsonl", rows)
    dataset = Dataset(train="rows.jsonl", max_length=30, on_long="split")
    prepared = prepare("rows.jsonl", dataset, tiny_chat.tokenizer(), tmp_path, keep_parsed=True)
    for number in (1, 2, 3, 6, 9):
        found = first(prepared, number)
        assert len(found.rows.firsts) == len(found.parsed) == min(number, 6)
        assert list(found.rows) == list(prepared.rows)[: len(found.rows)]
    assert len(first(prepared, 2).rows) > 2
    assert first(prepared, None) is prepared
