"""Delta-LoRA against a slow run of algorithm 1 that changes the weights step by step."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tiny import build, greedy, logits, stir
from torch import Tensor, nn

import peftctl
from peftctl.engine.attach import adapters_of, live, methods, trained
from peftctl.engine.disk import save

DELTA_LORA = peftctl.METHODS["delta_lora"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 6, generator=generator).double(), torch.randn(20, 5, generator=generator).double()


def slowly(pairs: list[list[Tensor]], scale: float, ratio: float, start: int, steps: int) -> list[tuple[Tensor, list]]:
    """Outputs and weights after each step of algorithm 1 as it stands, on copies of the pairs (A, B)."""
    model, (x, target) = network(), rows()
    pairs = [[factor.detach().double().clone().requires_grad_(True) for factor in pair] for pair in pairs]
    weights = [model[index].weight.detach().clone() for index in (0, 2)]
    optimizer = torch.optim.AdamW([factor for pair in pairs for factor in pair], lr=0.05)
    found = []

    def forward() -> Tensor:
        first, second = (W + scale * B @ A for (A, B), W in zip(pairs, weights, strict=True))
        return (x @ first.T + model[0].bias).tanh() @ second.T + model[2].bias

    for t in range(steps):
        before = [(B @ A).detach() for A, B in pairs]
        (forward() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if t > start:
            for index, (A, B) in enumerate(pairs):
                weights[index] += ratio * scale * ((B @ A).detach() - before[index])
        whole = [(W + scale * B @ A).detach() for (A, B), W in zip(pairs, weights, strict=True)]
        found.append((forward().detach(), whole))
    return found


@pytest.mark.parametrize(("ratio", "start"), [(0.5, 0), (2.0, 3), (1.0, 100)])
def test_algorithm_1(ratio, start):
    method = DELTA_LORA(r=2, alpha=3, update_ratio=ratio, start_steps=start, target_modules=["0", "2"])
    model, (x, target) = peftctl.attach(network(), method), rows()
    for adapter in adapters_of(model).values():
        adapter.double()
    pairs = [list(adapter.factors()) for adapter in adapters_of(model, "default").values()]
    expected = slowly(pairs, 1.5, ratio, start, steps=8)
    plain = slowly(pairs, 1.5, 0.0, 0, steps=8)[-1][0]
    base = [model[index].weight.detach().clone() for index in (0, 2)]
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
    for t, (outputs, weights) in enumerate(expected):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        method.after_step(model, t, len(expected))
        optimizer.zero_grad()
        torch.testing.assert_close(model(x), outputs, rtol=1e-9, atol=1e-9)
        for index, weight in zip((0, 2), weights, strict=True):
            merged = model[index].adapters["default"].merged(model[index].weight)
            torch.testing.assert_close(merged, weight, rtol=1e-6, atol=1e-6)  # merged in float32
    assert all(torch.equal(model[index].weight, W) for index, W in zip((0, 2), base, strict=True))
    assert torch.allclose(model(x), plain) == (start == 100)


def test_what_flows_back_to_the_input_passes_the_moved_weight():
    torch.manual_seed(0)
    model = peftctl.attach(nn.Sequential(nn.Linear(6, 8)), DELTA_LORA(r=2, target_modules=["0"]))
    stir(model)
    x = torch.randn(3, 6, requires_grad=True)
    host, adapter = model[0], model[0].adapters["default"]
    (found,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(found, adapter.merged(host.weight).sum(0).expand(3, 6).detach(), rtol=1e-5, atol=1e-5)


def test_the_moment_of_its_start_is_part_of_a_checkpoint():
    model = peftctl.attach(build("llama"), DELTA_LORA(r=2, target_modules=["q_proj"]))
    kept = {name.rpartition(".adapters.default.")[2] for name in live(model)}
    assert kept == {"lora_A.weight", "lora_B.weight", "start_A", "start_B"}
    stir(model)
    methods(model)["default"].after_step(model, 0, 10)
    state = {name: tensor.clone() for name, tensor in live(model).items()}
    assert all(torch.equal(state[n], state[n.replace("start_A", "lora_A.weight")]) for n in state if "start_A" in n)
    stir(model)
    methods(model)["default"].after_step(model, 1, 10)
    assert all(torch.equal(live(model)[name], tensor) == ("start_" in name) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_saved_as_a_lora_of_twice_the_rank(name, rslora, tmp_path):
    first = {"llama": "q_proj", "gpt2": "c_attn"}[name]
    method = DELTA_LORA(
        r=3, alpha=6, rank_pattern={first: 2}, alpha_pattern={first: 5}, use_rslora=rslora, bias="lora_only"
    )
    ours = peftctl.attach(build(name), method)
    stir(ours)
    method.after_step(ours, 0, 10)
    stir(ours, seed=8)
    save(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 6)
    assert set(config["rank_pattern"].values()) == {4}
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert greedy(ours) == greedy(theirs)
    again = peftctl.load(build(name), tmp_path)
    assert type(methods(again)["default"]) is peftctl.METHODS["lora"]
    torch.testing.assert_close(logits(ours), logits(again), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(build(name)), atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"dropout": 0.1}, "dropout: with it"), ({"init_weights": "pissa"}, "init_weights: `pissa` subtracts its start")],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        DELTA_LORA(**fields)
