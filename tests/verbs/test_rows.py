"""Rows of a recipe: what `eval.max_rows` leaves, and what the model cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_chat

import peftctl
from peftctl.data.dataset import Dataset
from peftctl.data.prepare import prepare
from peftctl.errors import DataError
from peftctl.verbs.evaluate import evaluate
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


def test_rows_longer_than_the_model_reads_are_refused(tmp_path: Path):
    base = tmp_path / "gpt2"
    tiny.gpt2().save_pretrained(base)
    tiny_chat.tokenizer().save_pretrained(base)
    rows = tiny_chat.write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 90}, {"text": "b" * 200}])
    recipe = tiny_chat.recipe(base, rows, output="run")
    with pytest.raises(DataError, match="the longest row has 201 tokens, and GPT2LMHeadModel reads 128; set `max_l"):
        peftctl.train(recipe, output=tmp_path / "run")
    prefix = {**recipe, "method": {"type": "prompt", "num_virtual_tokens": 8}}
    with pytest.raises(DataError, match="has 209 tokens, and GPT2LMHeadModel reads 128; set `max_length: 120`"):
        peftctl.train(prefix, output=tmp_path / "run")
    recipe["dataset"]["max_length"] = 128
    peftctl.train({**recipe, "trainer": {"steps": 1}}, output=tmp_path / "run")
    short = {**prefix, "dataset": {**recipe["dataset"], "max_length": 120}, "trainer": {"steps": 1}}
    run = peftctl.train(short, output=tmp_path / "short")["path"]
    with pytest.raises(DataError, match="reads 128; set `max_length: 120`"):
        evaluate(run, overrides=[f"dataset.eval={rows}", "dataset.max_length=128"])
