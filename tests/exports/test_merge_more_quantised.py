"""Quantised runs, trained here and merged: into the base as it was, and into what they were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine import hosts
from peftctl.engine.attach import adapters_of
from peftctl.errors import PeftctlError
from peftctl.models.base import Model, load
from peftctl.verbs.merge import merge

Make = Callable[..., Path]
SPECIAL = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
# multiples of 64: bitsandbytes' AVX-512 code misreads the scales of other widths
NETWORKS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, **HEADS, **SPECIAL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SPECIAL)),
}
CASES = [("llama", "nf4", True), ("llama", "nf4", False), ("llama", "fp4", True), ("llama", "int8", True)]
CASES += [("gpt2", "nf4", True), ("gpt2", "int8", True)]


@pytest.fixture
def make_run(make_base: Make, tmp_path: Path) -> Callable[..., Path]:
    """Trains a few steps on a quantised base, in float32; `network` as in NETWORKS."""

    def make(network: str, quantization: str, double: bool = True, **export: Any) -> Path:
        base = make_base("llama")  # for its tokenizer
        torch.manual_seed(0)
        NETWORKS[network]().save_pretrained(base)
        rows = [json.dumps({"text": f"say {n} and {7 * n}"}) for n in range(12)]
        (tmp_path / "train.jsonl").write_text("\n".join(rows))
        held = {"quantization": quantization, "double_quantization": double, "dtype": "float32", "device": "cpu"}
        recipe = {
            "model": {"name_or_path": str(base), **held},
            "method": {"type": "lora", "r": 4, "alpha": 8, "target_modules": "all-linear"},
            "dataset": {"train": str(tmp_path / "train.jsonl"), "format": "text"},
            "trainer": {"steps": 4, "batch_size": 4, "learning_rate": 0.02},
            "export": export,
            "output": "run",
        }
        return Path(peftctl.train(recipe, output=tmp_path / "run")["path"])

    return make


def block(base: Path, quantization: str, double: bool) -> Model:
    held: Any = {"quantization": quantization, "double_quantization": double}
    return Model(name_or_path=str(base), dtype="float32", device="cpu", **held)


def plain(folder: Path) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_hosts_equal(merged: nn.Module, live: nn.Module) -> None:
    """Every adapted weight is the live one, as it is kept there, with its update."""
    found = adapters_of(live, "default")
    assert len(found) in (8, 14)
    for site, adapter in found.items():
        a, b = adapter.plain()
        expected = hosts.weight(adapter.host).float() + adapter.scale * (b @ a)
        torch.testing.assert_close(hosts.weight(merged.get_submodule(site)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("network", "quantization", "double"), CASES)
def test_into_both(
    network: str, quantization: str, double: bool, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run, base = make_run(network, quantization, double), tmp_path / "base-0"
    live = peftctl.load(load(block(base, quantization, double)).model, run / "adapter").eval()
    # what was trained on
    assert merge(str(run), tmp_path / "trained", into="dequantised")["into"] == "dequantised"
    merged = plain(tmp_path / "trained")
    assert_hosts_equal(merged, live)
    # int8 rounds what goes into its layers as well, which no weight can express
    near = 0.05 if quantization == "int8" else 1e-5
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(live), rtol=0, atol=near)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{site}.weight" for site in adapters_of(live, "default")}
    # the base as it was, which is what happens unless asked otherwise
    assert merge(str(run), tmp_path / "out")["into"] == "base"
    merged, whole = plain(tmp_path / "out"), peftctl.load(plain(base), run / "adapter").eval()
    assert_hosts_equal(merged, whole)
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(whole), rtol=0, atol=1e-5)
    assert not torch.allclose(tiny.logits(merged), tiny.logits(live), atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_recipe_says_how(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("llama", "nf4", into="dequantised", dtype="bfloat16", shard_size=5e-5)
    assert merge(str(run), tmp_path / "out")["into"] == "dequantised"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == found
    values = [tensor for file in files for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in values} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in values)
    assert all(file.stat().st_size < 60_000 for file in files)  # 50 kB of weights, and the header
    assert plain(tmp_path / "out").config.dtype == torch.float32  # as asked for here, not as stored
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_that_changed_since(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("llama", "none")
    torch.manual_seed(1)
    NETWORKS["llama"]().save_pretrained(tmp_path / "base-0")
    with pytest.raises(PeftctlError, match=r"not the base that .* was trained on"):
        merge(str(run), tmp_path / "into" / "out")
    assert not (tmp_path / "into").exists() or not list((tmp_path / "into").iterdir())


def test_the_card_names_no_folder_of_this_machine(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("llama", "none")
    merge(str(run), tmp_path / "out")
    for folder in (run / "adapter", tmp_path / "out"):
        text = (folder / "README.md").read_text()
        assert "base-0" in text
        assert str(tmp_path) not in text
        assert tmp_path.name not in text
