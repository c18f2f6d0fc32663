"""What every method promises, on tiny models of every shape."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from methods.settings import SETTINGS, made
from tiny import build, greedy, inputs, logits, stir

import peftctl
from peftctl.engine.attach import adapters_of, stacks, trained
from peftctl.errors import AdapterError, NotMergeable
from peftctl.models.recomputing import recompute

CASES = [(method, name) for method, setting in SETTINGS.items() for name in setting.zoo]
LLAMAS = [method for method, setting in SETTINGS.items() if "llama" in setting.zoo]


def attached(method: str, name: str) -> torch.nn.Module:
    chosen = made(method, name)  # first: what it is made of may draw random numbers, once
    return peftctl.attach(build(name), chosen)


def train_a_little(model: torch.nn.Module, learning_rate: float, steps: int = 60) -> list[float]:
    """Losses of fitting the model to a fixed target; the same few rows each step."""
    torch.manual_seed(3)
    batch = inputs(model)
    labels = torch.randint(0, logits(model).shape[-1], logits(model).shape[:-1])
    update = torch.optim.AdamW(trained(model).values(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, -2), labels.flatten())
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(("method", "name"), CASES)
def test_starts_at_the_base(method, name):
    if not SETTINGS[method].starts_at_base:
        pytest.skip("starts elsewhere")
    assert torch.equal(logits(attached(method, name)), logits(build(name)))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_learns_and_touches_only_what_it_owns(method, name):
    model = attached(method, name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = train_a_little(model, SETTINGS[method].learning_rate)
    assert losses[-1] < SETTINGS[method].leaves * losses[0]
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == set(trained(model))
    assert SETTINGS[method].in_place or all(".adapters.default." in f".{key}" for key in changed)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_saves_and_loads(method, name, tmp_path):
    model = attached(method, name)
    stir(model)
    peftctl.save(model, tmp_path)
    assert torch.equal(logits(peftctl.load(build(name), tmp_path)), logits(model))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_merges_or_says_why_not(method, name):
    model = attached(method, name)
    stir(model)
    with_adapter = logits(model)
    if not SETTINGS[method].merges:
        with pytest.raises(NotMergeable):
            peftctl.merge(model)
        assert torch.equal(logits(model), with_adapter)
        return
    merged = peftctl.merge(model)
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-5, atol=1e-5)
    assert not list(stacks(merged))
    assert merged.state_dict().keys() == build(name).state_dict().keys()


@pytest.mark.parametrize(("method", "name"), CASES)
def test_detach_gives_the_model_back(method, name):
    model = attached(method, name)
    stir(model)
    if SETTINGS[method].in_place:
        with pytest.raises(AdapterError, match="no longer as it was"):
            peftctl.detach(model)
        return
    peftctl.detach(model)
    plain = build(name)
    assert torch.equal(logits(model), logits(plain))
    assert [key for key, _ in model.named_modules()] == [key for key, _ in plain.named_modules()]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("method", "name"), CASES)
def test_survives_copy_and_pickle(method, name):
    model = attached(method, name)
    stir(model)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        stir(model, seed=9)  # the twin does not follow the original
        assert torch.equal(logits(twin), expected)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_compiles(method, name):
    model = attached(method, name)
    stir(model)
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs(model)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_gradient_checkpointing_changes_nothing(method, name):
    if "trainer.gradient_checkpointing" in peftctl.METHODS[method].clashes:
        pytest.skip("refused when the recipe is read")

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = attached(method, name)
        stir(model)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            recompute(model)
        model(**inputs(model)).logits.square().mean().backward()
        return {key: p.grad for key, p in trained(model).items()}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient)


@pytest.mark.parametrize("method", [method for method in LLAMAS if not SETTINGS[method].in_place])
def test_several_adapters_and_switching(method):
    model = build("llama")
    base = logits(model)
    alone = {}
    for index, name in enumerate(("a", "b")):
        peftctl.attach(model, made(method), name)
        stir(model, seed=index)
        alone[name] = logits(model)
    peftctl.activate(model, ["a"])
    assert torch.equal(logits(model), alone["a"])
    peftctl.activate(model, ["a", "b"])
    both = logits(model)
    assert not torch.allclose(both, alone["a"])
    assert torch.allclose(both, alone["b"]) == SETTINGS[method].replaces
    with peftctl.bare(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)
    if SETTINGS[method].scalable:
        peftctl.activate(model, {"a": 0.0, "b": 1.0})
        torch.testing.assert_close(logits(model), alone["b"])
    else:
        with pytest.raises(AdapterError):
            peftctl.activate(model, {"a": 0.0, "b": 1.0})
    peftctl.detach(model, "a")
    peftctl.activate(model, ["b"])
    assert torch.equal(logits(model), alone["b"])
    assert greedy(model)


@pytest.mark.parametrize("method", LLAMAS)
def test_half_precision_base_with_float32_adapters(method):
    model = peftctl.attach(build("llama").bfloat16(), made(method))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    losses = train_a_little(model, SETTINGS[method].learning_rate)
    assert losses[-1] < losses[0]
    assert logits(model).dtype == (torch.float32 if SETTINGS[method].in_place else torch.bfloat16)


def test_live_names_lie_below_their_host():
    model = attached("lora", "llama")
    assert "model.layers.0.self_attn.q_proj" in adapters_of(model, "default")
    assert "model.layers.0.self_attn.q_proj.adapters.default.lora_A.weight" in trained(model)


def test_every_method_is_held_to_the_contract():
    assert set(SETTINGS) == set(peftctl.METHODS)
