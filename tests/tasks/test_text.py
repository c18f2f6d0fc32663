"""Plain texts: what `sft` makes of them, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from safetensors.torch import load_file

import peftctl
from peftctl.data.formats import Chat, Pair, Text
from peftctl.errors import DataError, RecipeError
from peftctl.tasks.text import PlainText
from peftctl.verbs.evaluate import evaluate


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    base = tiny_chat.write_base(tmp_path / "model")
    rows = tiny_chat.write_rows(tmp_path / "rows.jsonl", [{"text": "so it goes on " * (1 + i % 3)} for i in range(9)])
    return lambda task, **blocks: tiny_chat.recipe(base, rows, rows, trainer={"task": task}, **blocks)


def test_texts_are_trained_as_sft_trains_them(made: Any, tmp_path: Path):
    runs = {task: peftctl.train(made(task), output=tmp_path / task)["path"] for task in ("text", "sft")}
    one, other = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in runs.values())
    assert all((one[name] == other[name]).all() for name in one)
    figures = evaluate(runs["text"])["figures"]
    assert figures["adapter"]["perplexity"] < figures["base"]["perplexity"]


def test_a_prompt_and_its_completion_are_one_text():
    assert PlainText().accept(Pair("f:1", "a ", "b")) == Text("f:1", "a b")
    with pytest.raises(DataError, match="f:1: `text` trains plain texts"):
        PlainText().accept(Chat("f:1", []))


def test_texts_have_no_answers_to_measure(made: Any):
    with pytest.raises(RecipeError, match="exact_match is not measured of `text`; metrics: loss, perplexity"):
        peftctl.train(made("text", eval={"metrics": ["exact_match"]}))
