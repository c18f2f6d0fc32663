"""Merging and taking it back: the base has its old bits again."""

from __future__ import annotations

import pickle

import pytest
import torch
from methods.settings import SETTINGS
from tiny import build, llama, logits, stir

import peftctl
from peftctl.engine.attach import stacks
from peftctl.errors import AdapterError

CASES = [(m, name) for m, setting in SETTINGS.items() if setting.merges for name in setting.zoo]


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".adapters." not in f".{name}"}


@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_base_comes_back_bit_for_bit(method, name):
    model = peftctl.attach(build(name).bfloat16(), peftctl.METHODS[method](**SETTINGS[method].fields))
    stir(model)
    before, with_adapter = bits(model), logits(model)
    for _ in range(3):
        merged = peftctl.merge(model, keep=True)
        assert not list(stacks(merged))
        changed = any(not torch.equal(p, before[key]) for key, p in merged.named_parameters())
        assert changed != SETTINGS[method].in_place  # trained weights are merged already
        peftctl.unmerge(model)
    after = bits(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model), with_adapter)


def test_what_was_active_is_active_again_and_ties_are_tied_again():
    torch.manual_seed(0)
    model = llama(tied=True).eval()
    for seed, name in enumerate(("a", "b")):
        peftctl.attach(model, peftctl.METHODS["lora"](target_modules=["embed_tokens", "q_proj"]), name)
        stir(model, seed)
    peftctl.activate(model, {"b": 0.5})
    expected = logits(model)
    peftctl.merge(model, keep=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    peftctl.unmerge(pickle.loads(pickle.dumps(model)))
    peftctl.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(logits(model), expected)
    peftctl.activate(model, ["a", "b"])


def test_without_keep_there_is_no_way_back():
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"]())
    with pytest.raises(AdapterError, match="nothing was kept"):
        peftctl.unmerge(model)
    peftctl.merge(model)
    with pytest.raises(AdapterError, match="nothing was kept"):
        peftctl.unmerge(model)


def test_adapters_attached_since_come_off_first():
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"]())
    peftctl.merge(model, keep=True)
    peftctl.attach(model, peftctl.METHODS["lora"](), "later")
    with pytest.raises(AdapterError, match="attached since"):
        peftctl.unmerge(model)
    peftctl.detach(model, "later")
    assert list(stacks(peftctl.unmerge(model)))


def test_unmerge_keeps_the_order_in_which_adapters_act():
    model = build("llama")
    for seed, (name, targets) in enumerate({"a": ["v_proj"], "b": ["q_proj", "v_proj"]}.items()):
        peftctl.attach(model, peftctl.METHODS["ia3"](target_modules=targets, feedforward_modules=[]), name)
        stir(model, seed)
    peftctl.activate(model, ["a", "b"])
    orders = [stack.active for _, _, stack in stacks(model)]
    peftctl.unmerge(peftctl.merge(model, keep=True))
    assert [stack.active for _, _, stack in stacks(model)] == orders
