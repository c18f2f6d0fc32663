"""`peftctl merge` and `export`: what comes out works in plain transformers and in peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_chat
import torch

import peftctl
from peftctl.recipe import read_run
from peftctl.verbs.generate import generate

QUESTIONS = ["is it b?", "x!!!?", "is it is it k!?"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answers(folder: Path) -> list[str]:
    """Greedy text of plain transformers, with the tokenizer and the template that lie in the folder."""
    from transformers import AutoTokenizer

    model, tokenizer = tiny_chat.plain(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("words", [("merge",), ("export", "--format", "safetensors")])
def test_the_merged_model_says_what_the_adapter_says(
    words: tuple[str, ...], finished: Path, base: Path, cli: Callable[..., SimpleNamespace], tmp_path: Path
):
    result = cli(words[0], finished, *words[1:], "--output", "merged")
    assert (result.code, result.out) == (0, "merged\n"), result.err
    expected = [generate(str(finished), question, max_new_tokens=12) for question in QUESTIONS]
    assert answers(tmp_path / "merged") == expected
    assert answers(base) != expected
    adapted = peftctl.load(tiny_chat.plain(base), finished / "adapter")
    merged = tiny_chat.plain(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(adapted), atol=1e-5, rtol=0)
    assert not list(tmp_path.glob(".*"))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# Merged model of `tiny-llama`" in card
    assert str(base.parent) not in card
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_the_report_tells_what_changed(finished: Path, cli: Callable[..., SimpleNamespace], tmp_path: Path):
    result = cli("merge", finished, "--output", "merged", "--json")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert json.loads(result.out) == {"path": "merged", **report}
    changed = report["tensors"]["changed"]
    names = [change if isinstance(change, str) else change["name"] for change in changed]
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 14
    assert {name.split(".")[-2] for name in names} == linears


def test_the_same_adapter_is_not_merged_twice(finished: Path, cli: Callable[..., SimpleNamespace], tmp_path: Path):
    assert cli("merge", finished, "--output", "merged").code == 0
    result = cli("merge", finished, "--output", "twice", "--base", tmp_path / "merged")
    assert result.code == 1
    assert "merged" in result.err
    assert result.err.startswith("error: ") or "\nerror: " in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_merged_model_is_a_base_like_any_other(finished: Path, made: Callable[..., Any], tmp_path: Path):
    from peftctl.verbs.merge import merge

    merge(str(finished), tmp_path / "merged")
    peftctl.train(made(model={"name_or_path": str(tmp_path / "merged")}, trainer={"steps": 1}))
    merge("run", tmp_path / "again")
    torch.testing.assert_close(
        tiny.logits(tiny_chat.plain(tmp_path / "again")),
        tiny.logits(peftctl.load(tiny_chat.plain(tmp_path / "merged"), tmp_path / "run" / "adapter")),
        atol=1e-5,
        rtol=0,
    )


def test_an_exported_adapter_loads_in_peft(
    finished: Path, base: Path, cli: Callable[..., SimpleNamespace], tmp_path: Path
):
    from peft import PeftModel

    result = cli("export", finished, "--format", "peft", "--output", "adapter")
    assert (result.code, result.out) == (0, "adapter\n")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "peftctl.json", "README.md"}
    assert names == files
    assert str(base.parent) not in (tmp_path / "adapter" / "peftctl.json").read_text()
    model = PeftModel.from_pretrained(tiny_chat.plain(base), "adapter").eval()
    ours = peftctl.load(tiny_chat.plain(base), finished / "adapter")
    torch.testing.assert_close(tiny.logits(model), tiny.logits(ours), atol=1e-6, rtol=0)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "# Adapter of `tiny-llama`" in card
    assert "`lora`, r 4, alpha 8, on all-linear" in card
    assert "| train | 11 | 11 | 0 | 0 | 0 |" in card
    assert str(base.parent) not in card
    assert str(finished.parent) not in card


def test_an_adapter_folder_alone_can_be_merged(finished: Path, tmp_path: Path, cli: Callable[..., SimpleNamespace]):
    assert cli("export", finished, "--format", "peft", "--output", "adapter").code == 0
    base = read_run(finished).model.name_or_path  # an exported adapter names no folder of this machine
    assert cli("merge", "adapter", "--output", "merged", "--base", base).code == 0
    assert answers(tmp_path / "merged") == [generate(str(finished), q, max_new_tokens=12) for q in QUESTIONS]
