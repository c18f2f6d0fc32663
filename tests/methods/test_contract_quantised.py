"""What every method promises on 4-bit bases, GPT-2's transposed linears among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_chat
import torch
from methods.settings import SETTINGS, made
from tiny import VOCAB, inputs, logits, stir
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine.attach import stacks, trained
from peftctl.errors import NotMergeable
from peftctl.models.base import Model, load
from peftctl.verbs.mortal import one_thread

SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NETWORKS: dict[str, Callable[[], nn.Module]] = {  # widths that 4-bit blocks divide
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **SIZES)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SIZES)),
}
CASES = [
    (method, name)
    for method, setting in SETTINGS.items()
    for name in NETWORKS
    if setting.quantised and name in setting.zoo and not setting.on(name)  # those stand on what was trained before
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in NETWORKS}
    for name, folder in found.items():
        torch.manual_seed(0)
        NETWORKS[name]().save_pretrained(folder)
        tiny_chat.tokenizer().save_pretrained(folder)
    return found


def quantised(folder: Path) -> nn.Module:
    return load(Model(name_or_path=str(folder), quantization="nf4", dtype="float32", device="cpu")).model


@pytest.mark.parametrize(("method", "name"), CASES)
def test_starts_learns_and_leaves_the_base_alone(method: str, name: str, folders: dict[str, Path]):
    model = quantised(folders[name])
    base = logits(model)
    peftctl.attach(model, made(method, name))
    if SETTINGS[method].starts_at_base:
        torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5)
    batch = inputs(model)
    update = torch.optim.AdamW(trained(model).values(), lr=SETTINGS[method].learning_rate / 4)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(**batch).logits.flatten(0, -2), batch["input_ids"].flatten())
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.99 * losses[0]
    with peftctl.bare(model):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_saves_loads_and_does_not_merge_in_place(method: str, name: str, folders: dict[str, Path], tmp_path: Path):
    model = peftctl.attach(quantised(folders[name]), made(method, name))
    stir(model)
    peftctl.save(model, tmp_path)
    expected = logits(model)
    again = peftctl.load(quantised(folders[name]), tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotMergeable):
        peftctl.merge(model)
    assert list(stacks(model))
    assert torch.equal(logits(model), expected)
