"""Attach, activate, detach, bare: what they refuse, what they restore, who trains."""

from __future__ import annotations

import inspect

import pytest
import torch
from engine.folders import refusal, state
from tiny import build, greedy, inputs, logits, stir
from torch import nn

import peftctl
from peftctl.engine.attach import adapters_of, methods, stacks, trained
from peftctl.errors import AdapterError


def lora(**fields):
    return peftctl.METHODS["lora"](**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | fields)


def two(**fields) -> nn.Module:
    """A Llama with the adapters `a` and `b`, of different values."""
    model = build("llama")
    for seed, name in enumerate("ab"):
        peftctl.attach(model, lora(**fields), name)
        stir(model, seed)
    return model


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä", "x" * 101, "../up", "forward", "training", "keys", "a\x1b[2J"])
def test_names_that_cannot_be(name):
    with refusal(model := build("llama")) as problems:
        peftctl.attach(model, lora(), name)
    assert problems[0].startswith("adapter name `")
    assert problems[0].isprintable()


@pytest.mark.parametrize("name", ["default", "a", "0", "lora_A", "x" * 100, "weight"])
def test_names_that_can_be(name):
    model = peftctl.attach(build("llama"), lora(), name)
    stir(model)
    assert not torch.equal(logits(model), logits(build("llama")))
    assert set(state(peftctl.detach(model, name))["modules"]) == set(state(build("llama"))["modules"])


def test_a_name_is_taken_once():
    with refusal(model := two()) as problems:
        peftctl.attach(model, lora(), "a")
    assert problems == ["adapter name `a`: taken on this model; detach it first, or choose another name"]


def test_all_that_is_wrong_with_an_activation_is_told_and_nothing_changes():
    model = peftctl.attach(two(), lora(modules_to_save=["lm_head"]), "head")
    strengths = {key: adapter.strength for key, adapter in adapters_of(model).items()}
    with refusal(model) as problems:
        peftctl.activate(model, {"a": 0.5, "b": float("nan"), "head": 2.0, "c": 1.0})
    assert problems == [
        "adapter `b`: expected a finite number as its weight; got `nan`; None",
        "adapter `head`: Trained at `lm_head` has no weight update to multiply; use the weight 1",
        "adapter `c`: not attached to this model; attached: `a`, `b`, `head`",
    ]
    assert {key: adapter.strength for key, adapter in adapters_of(model).items()} == strengths


@pytest.mark.parametrize("weight", ["0.5", None, True, float("inf")])
def test_weights_that_are_no_numbers(weight):
    with refusal(model := two()) as problems:
        peftctl.activate(model, {"a": weight})
    assert "expected a finite number" in problems[0]


def test_one_name_may_stand_alone():
    model = two()
    expected = logits(peftctl.activate(model, ["a"]))
    peftctl.activate(model, ["b"])
    assert torch.equal(logits(peftctl.activate(model, "a")), expected)


def test_unknown_names_are_told_with_those_there_are():
    for model, have in ((build("llama"), "none"), (two(), "`a`, `b`")):
        for call in (lambda m: peftctl.detach(m, "c"), lambda m: peftctl.activate(m, ["c"])):
            with refusal(model) as problems:
                call(model)
            assert problems == [f"adapter `c`: not attached to this model; attached: {have}"]


def test_weights_sum_the_updates():
    model = two()
    plain = build("llama")
    for site, adapter in adapters_of(model, "a").items():
        other = adapters_of(model, "b")[site]
        update = sum(
            weight * each.scale * each.lora_B.weight @ each.lora_A.weight
            for weight, each in ((0.7, adapter), (0.3, other))
        )
        with torch.no_grad():
            plain.get_parameter(f"{site}.weight").add_(update)
    peftctl.activate(model, {"a": 0.7, "b": 0.3})
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(peftctl.merge(model)), logits(plain), rtol=1e-5, atol=1e-5)


def test_names_after_weights_count_fully_again():
    model = two()
    expected = logits(peftctl.activate(model, ["a", "b"]))
    peftctl.activate(model, {"a": 0.7, "b": -0.3})
    assert not torch.allclose(logits(model), expected)
    assert torch.equal(logits(peftctl.activate(model, ["a", "b"])), expected)
    assert torch.equal(logits(peftctl.activate(model, [])), logits(build("llama")))


def test_only_the_newest_adapter_trains():
    model = build("llama")
    for name in "abc":
        peftctl.attach(model, lora(modules_to_save=["lm_head"], bias="all"), name)
        assert trained(model)
        assert all(f".adapters.{name}." in key for key in trained(model))
    model(**inputs(model)).logits.square().mean().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} <= set(trained(model))


def test_one_adapter_with_a_head_and_one_without():
    model = peftctl.attach(build("llama"), lora(modules_to_save=["lm_head"]), "head")
    stir(model, 0)
    with_head = logits(model)
    peftctl.attach(model, lora(), "plain")
    stir(model, 1)
    plain = logits(model)
    base = build("llama")
    assert torch.equal(logits(peftctl.activate(model, ["head"])), with_head)
    both = logits(peftctl.activate(model, ["plain", "head"]))
    assert not torch.allclose(both, with_head)
    assert not torch.allclose(both, plain)
    peftctl.detach(model, "head")
    assert torch.equal(logits(peftctl.activate(model, ["plain"])), plain)
    assert model.lm_head.forward == nn.Linear.forward.__get__(model.lm_head)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_detach_gives_an_offload_hook_its_forward_back():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = build("llama")
    expected, seen = logits(model), []

    class Seen(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return super().pre_forward(module, *args, **kwargs)

    hosts = [model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.down_proj]
    for host in hosts:
        add_hook_to_module(host, Seen(execution_device="cpu"))
    hooked = [vars(host)["forward"] for host in hosts]
    peftctl.attach(model, lora())
    stir(model)
    assert not torch.allclose(logits(model), expected)
    assert seen == hosts
    peftctl.detach(model)
    assert [vars(host)["forward"] for host in hosts] == hooked
    assert torch.equal(logits(model), expected)
    assert seen == hosts * 2
    for host in hosts:
        remove_hook_from_module(host)
    assert torch.equal(logits(model), expected)


def test_a_hook_on_top_of_an_adapter_comes_off_first():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    model = peftctl.attach(build("llama"), lora())
    add_hook_to_module(model.model.layers[0].self_attn.q_proj, AlignDevicesHook(execution_device="cpu"))
    with refusal(model) as problems:
        peftctl.detach(model)
    assert len(problems) == 1
    assert "`model.layers.0.self_attn.q_proj` was hooked after it was attached" in problems[0]
    remove_hook_from_submodules(model)
    assert torch.equal(logits(peftctl.detach(model)), logits(build("llama")))


def test_attached_in_training_its_dropout_acts():
    model = build("llama").train()
    peftctl.attach(model, lora(dropout=0.5))
    stir(model)
    assert all(adapter.training for adapter in adapters_of(model).values())
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))
    assert not any(adapter.training for adapter in adapters_of(peftctl.attach(model, lora(), "b"), "b").values())


def test_signatures_survive_and_generate_works():
    plain = build("llama")
    names = ("", "lm_head", "model.layers.0.self_attn.q_proj")
    expected = [inspect.signature(plain.get_submodule(name).forward) for name in names]
    model = peftctl.attach(build("llama"), lora(modules_to_save=["lm_head"]))
    stir(model)
    assert [inspect.signature(model.get_submodule(name).forward) for name in names] == expected
    assert type(model) is type(plain)
    assert greedy(model) != greedy(plain)
    with peftctl.bare(model):
        assert greedy(model) == greedy(plain)


def test_bare_ends_with_an_error_too():
    model = two()
    before = logits(model)
    with pytest.raises(ZeroDivisionError), peftctl.bare(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)


def test_detach_leaves_no_trace():
    model = two(bias="all", modules_to_save=["lm_head"])
    for name in "ab":
        peftctl.detach(model, name)
    assert not list(stacks(model))
    assert state(model)["modules"] == state(build("llama"))["modules"]
    assert all(torch.equal(p, build("llama").state_dict()[key]) for key, p in model.state_dict().items())
    assert peftctl.attach(model, lora(), "a") is model


def test_heads_in_four_bits_cannot_be_trained():
    class Linear4bit(nn.Linear):
        pass

    model = build("llama")
    model.lm_head.__class__ = Linear4bit
    with pytest.raises(AdapterError, match="stored in 4 or 8 bits cannot be trained"):
        peftctl.attach(model, lora(modules_to_save=["lm_head"]))


def test_a_start_that_fails_leaves_earlier_adapters_as_they_were():
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=2), "a")
    active, trainable = [stack.active for _, _, stack in stacks(model)], set(trained(model))
    with pytest.raises(AdapterError, match="`eva` needs rows"):
        peftctl.attach(model, peftctl.METHODS["lora"](r=2, init_weights="eva"), "b")
    assert set(methods(model)) == {"a"}
    assert [stack.active for _, _, stack in stacks(model)] == active
    assert set(trained(model)) == trainable
