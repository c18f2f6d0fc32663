"""The folders to give away: an adapter and a merged model, each with its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import peftctl
from peftctl.errors import AdapterError, StorageError
from peftctl.exports.card import Facts
from peftctl.exports.peft import export_peft
from peftctl.exports.safetensors import export_safetensors

Make = Callable[..., Path]


def facts(base: Path) -> Facts:
    counts = {"train": {"read": 3, "kept": 3, "truncated": 0, "split": 0, "dropped": 0, "skipped": 0}}
    recipe = f"model:\n  name_or_path: {base}\nmethod:\n  type: lora\n  r: 32\n"
    return Facts(base=str(base), method="`lora`, r 32", recipe=recipe, counts=counts)


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_an_adapter_to_give_away(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(base)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    report = export_peft(adapter, tmp_path / "out", facts=facts(base))
    assert len(report["sha256"]) == 64
    theirs = peft.PeftModel.from_pretrained(plain(base), tmp_path / "out").eval()
    ours = peftctl.load(plain(base), adapter).eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(ours), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja")
    }
    told = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in told + json.dumps(config)
    assert "--max-lora-rank 32" in told


def test_the_card_of_an_adapter_that_nothing_is_known_of(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama")
    little = Facts(base="org/base", method="`LORA`", recipe="model:\n  name_or_path: org/base\n", counts={})
    export_peft(make_adapter(base), tmp_path / "out", facts=little)
    told = (tmp_path / "out" / "README.md").read_text()
    assert "## Data" not in told
    assert "vllm serve org/base --enable-lora --lora-modules" in told


def test_an_adapter_is_not_exported_over_another(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(base)
    export_peft(adapter, tmp_path / "out", facts=facts(base))
    with pytest.raises(StorageError, match="exists already"):
        export_peft(adapter, tmp_path / "out", facts=facts(base))


def test_what_is_no_adapter_is_not_exported(make_base: Make, tmp_path: Path) -> None:
    base = make_base("llama")
    with pytest.raises(AdapterError):
        export_peft(base, tmp_path / "out", facts=facts(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_a_model_to_give_away(name: str, make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base(name)
    adapter = make_adapter(base, target_modules="all-linear", modules_to_save=["lm_head"])
    report = export_safetensors(base, adapter, tmp_path / "out", facts=facts(base))
    assert report["untied_embeddings"]
    assert report["base"]["name"] == base.name
    ours = peftctl.load(plain(base), adapter).eval()
    merged = plain(tmp_path / "out")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(ours), rtol=0, atol=1e-5)
    assert tiny.greedy(merged) == tiny.greedy(ours)
    told = (tmp_path / "out" / "README.md").read_text()
    assert "# Merged model of" in told
    assert str(tmp_path) not in told + (tmp_path / "out" / "merge_report.json").read_text()
