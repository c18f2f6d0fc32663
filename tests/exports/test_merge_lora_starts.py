"""Merging LoRAs that start away from zero, and rows of tokens, through recipes and folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine import hosts
from peftctl.engine.attach import adapters_of
from peftctl.errors import AdapterError, NotMergeable
from peftctl.exports.merge import merge as merge_folder
from peftctl.models.base import Model, load
from peftctl.verbs.merge import merge

Make = Callable[..., Path]
SPECIAL = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
NETWORKS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, **HEADS, **SPECIAL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SPECIAL)),
}


@pytest.fixture
def make_run(make_base: Make, tmp_path: Path) -> Callable[..., Path]:
    """Trains a few steps of LoRA with `init_weights: how` on a base in `quantization`, in float32."""

    def make(network: str, how: str, quantization: str, run: str = "run", **fields: Any) -> Path:
        base = tmp_path / "base-0" if fields else make_base("llama")  # for its tokenizer
        torch.manual_seed(0)
        NETWORKS[network]().save_pretrained(base)
        (tmp_path / "train.jsonl").write_text(
            "\n".join(json.dumps({"text": f"say {n} and {7 * n}"}) for n in range(12))
        )
        held = {"quantization": quantization, "dtype": "float32", "device": "cpu"}
        recipe = {
            "model": {"name_or_path": str(base), **held},
            "method": {"type": "lora", "r": 4, "alpha": 6, "init_weights": how, **fields},
            "dataset": {"train": str(tmp_path / "train.jsonl"), "format": "text"},
            "trainer": {"steps": 4, "batch_size": 4, "learning_rate": 0.02},
            "output": "run",
        }
        return Path(peftctl.train(recipe, output=tmp_path / run)["path"])

    return make


def live(run: Path, quantization: str) -> Any:
    """The run's adapter on the base that it was trained on."""
    block = Model(name_or_path=str(run.parent / "base-0"), quantization=quantization, dtype="float32", device="cpu")  # type: ignore[arg-type]
    return peftctl.load(load(block).model, run / "adapter")


@pytest.mark.parametrize("network", NETWORKS)
def test_loftq_merges_into_what_it_was_trained_on_alone(network: str, make_run: Make, tmp_path: Path) -> None:
    run = make_run(network, "loftq", "nf4")
    for target in (run, run / "adapter"):
        with pytest.raises(NotMergeable, match="makes up for the quantisation that it was trained on"):
            merge(str(target), tmp_path / "out")
    report = merge(str(run), tmp_path / "out", into="dequantised")
    assert report["proof"]["difference"] < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for site, adapter in adapters_of(live(run, "nf4"), "default").items():
        A, B = adapter.plain()
        expected = hosts.weight(adapter.host).float() + (6 / 4) * B @ A
        torch.testing.assert_close(hosts.weight(merged.get_submodule(site)), expected, rtol=0, atol=2e-6)


def test_a_run_goes_on_from_loftq_only_as_loftq(make_run: Make, tmp_path: Path) -> None:
    first = make_run("llama", "loftq", "nf4")
    with pytest.raises(AdapterError, match="made up for the quantisation of its base, which this run does not"):
        make_run("llama", "default", "nf4", "second", init_from=str(first / "adapter"))
    second = make_run("llama", "loftq", "nf4", "second", init_from=str(first / "adapter"))
    with pytest.raises(NotMergeable):
        merge(str(second), tmp_path / "out")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("how", "into"), [("pissa", "base"), ("pissa", "dequantised"), ("olora", "base"), ("eva", "base")]
)
def test_other_starts_merge_into_either(how: str, into: str, network: str, make_run: Make, tmp_path: Path) -> None:
    run = make_run(network, how, "nf4")
    merge(str(run), tmp_path / "out", into=into)
    merged, base = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tmp_path / "out", tmp_path / "base-0")
    )
    for site, adapter in adapters_of(live(run, "nf4"), "default").items():
        A, B = adapter.plain()
        assert len(A) == (4 if how == "eva" else 8)
        before = adapter.host if into == "dequantised" else base.get_submodule(site)
        expected = hosts.weight(before).float() + (6 / 4) * B @ A
        torch.testing.assert_close(hosts.weight(merged.get_submodule(site)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "indices", "untied"),
    [
        ("llama", [40, 7], False),
        ("llama tied", [40, 7], False),
        ("gpt2", [40, 7], False),
        ("llama", {"embed_tokens": [40, 7], "lm_head": [9]}, False),
        ("llama tied", {"embed_tokens": [40, 7], "lm_head": [9]}, True),
    ],
)
def test_rows_of_tokens_merge_at_both_ends(
    name: str, indices: Any, untied: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base(name)
    adapter = make_adapter(base, trainable_token_indices=indices)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    was_tied = before.config.tie_word_embeddings
    expected = tiny.logits(peftctl.load(before, adapter))
    report = merge_folder(base, adapter, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(tiny.logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert report["untied_embeddings"] is untied
    assert merged.config.tie_word_embeddings is (was_tied and not untied)
    one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert one is (was_tied and not untied)
    names = {
        file: set(load_file(folder / "model.safetensors")) for file, folder in (("a", base), ("b", tmp_path / "out"))
    }
    assert (names["a"] == names["b"]) is not untied
