"""Starts on 4- and 8-bit hosts: PiSSA and OLoRA of what is held, LoftQ of what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine import hosts
from peftctl.engine.attach import adapters_of, methods
from peftctl.engine.sample import Sample
from peftctl.errors import AdapterError, NotMergeable
from peftctl.models import quantization

LORA = peftctl.METHODS["lora"]
SPECIAL = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
# multiples of 64: bitsandbytes' AVX-512 code misreads the scales of other widths
NETWORKS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, **HEADS, **SPECIAL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SPECIAL)),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "attn.c_proj"]}  # one square, one not


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    NETWORKS[name]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def held(folder: Path, kind: str = "nf4") -> nn.Module:
    """The model in `folder`, its linears in 4 or 8 bits, as `peftctl` loads it."""
    config = quantization.config(kind, double=True, dtype=torch.float32, device=torch.device("cpu"))
    place = {"device_map": {"": "cpu"}, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **place).eval()
    quantization.keep_layout(model)
    return model


def attached(folder: Path, name: str, how: str, kind: str = "nf4", sample: Sample | None = None) -> nn.Module:
    method = LORA(r=4, alpha=6, target_modules=TARGETS[name], init_weights=how)
    return peftctl.attach(held(folder, kind), method, sample=sample)


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, V = torch.linalg.svd(matrix)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def unquantised(folder: Path, name: str, site: str) -> torch.Tensor:
    """The weight [out, in] as the files have it."""
    weight = AutoModelForCausalLM.from_pretrained(folder).get_submodule(site).weight.detach()
    return weight.T if name == "gpt2" else weight


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_starts_from_the_weight_that_is_held(how, kind, name, folder, tmp_path):
    model, plain = attached(folder, name, how, kind), held(folder, kind)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(plain), rtol=0, atol=1e-6)
    for adapter in adapters_of(model, "default").values():
        assert hosts.is_quantised(adapter.host)
        product, weight = adapter.lora_B.weight @ adapter.lora_A.weight, hosts.weight(adapter.host).float()
        Q, R = torch.linalg.qr(weight)
        expected = best(weight, 4) / (6 / 4) if how == "pissa" else Q[:, :4] @ R[:4]
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
    tiny.stir(model)
    peftctl.save(model, tmp_path / "adapter")
    again = peftctl.load(held(folder, kind), tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model), rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(held(folder, kind), tmp_path / "adapter").eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), rtol=1e-4, atol=1e-5)


def test_loftq_makes_up_for_what_quantisation_took(name, folder):
    model = attached(folder, name, "loftq")
    for site, adapter in adapters_of(model, "default").items():
        before, now = unquantised(folder, name, site), hosts.weight(adapter.host).float()
        update = (6 / 4) * adapter.lora_B.weight @ adapter.lora_A.weight
        torch.testing.assert_close(update, best(before - now, 4), rtol=1e-3, atol=1e-6)
        assert (before - now - update).norm() < 0.95 * (before - now).norm()


def test_loftq_takes_the_files_that_the_sample_names(name, folder):
    expected = adapters_of(attached(folder, name, "loftq"), "default")
    model = held(folder)
    model.name_or_path = model.config._name_or_path = "someone/else"
    method = LORA(r=4, alpha=6, target_modules=TARGETS[name], init_weights="loftq")
    with pytest.raises(AdapterError, match="someone/else: its unquantised weights cannot be found"):
        peftctl.attach(model, method)
    peftctl.attach(model, method, sample=Sample(None, lambda: iter(()), lambda *_: torch.zeros(()), folder))
    for site, adapter in adapters_of(model, "default").items():
        assert torch.equal(adapter.lora_A.weight, expected[site].lora_A.weight)


@pytest.mark.parametrize("harm", ["renamed", "truncated", "integers"])
def test_loftq_says_what_is_wrong_with_the_files(harm, name, folder):
    model, file = held(folder), folder / "model.safetensors"
    tensors = load_file(file)
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        change = {"renamed": lambda key, t: ("x." + key, t), "integers": lambda key, t: (key, t.to(torch.int8))}[harm]
        save_file(dict(change(key, t) for key, t in tensors.items()), file)
    told = {"renamed": "not in its files", "truncated": "damaged or truncated", "integers": "of int8, no weight of"}
    with pytest.raises(AdapterError, match=told[harm]):
        peftctl.attach(model, LORA(r=4, target_modules=TARGETS[name], init_weights="loftq"))


def test_loftq_is_a_plain_lora_that_remembers_its_base(name, folder, tmp_path):
    model = attached(folder, name, "loftq")
    tiny.stir(model)
    peftctl.save(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    (folder / "model.safetensors").rename(folder / "away.safetensors")  # loading looks at no file of the base
    base = NETWORKS[name]()
    loaded = peftctl.load(base, tmp_path / "adapter")
    assert methods(loaded)["default"].needs_quantised
    with pytest.raises(NotMergeable, match="makes up for the quantisation"):
        peftctl.merge(loaded)
    (folder / "away.safetensors").rename(folder / "model.safetensors")
    again = peftctl.load(held(folder), tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    peftctl.save(again, tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert saved | {"base_model_name_or_path": None} == config | {"base_model_name_or_path": None}
    theirs = peft.PeftModel.from_pretrained(held(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), rtol=1e-4, atol=1e-5)
