"""LoRA around convolutions: every shape of kernel against a slow computation, merges, and PEFT where PEFT is right."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import stir
from torch import nn

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError, NotMergeable

LORA = peftctl.METHODS["lora"]

SHAPES = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 2, "dilation": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "stride": 2, "padding_mode": "replicate"},
    "no bias": {"bias": False},
}
PEFT_IS_RIGHT = ("plain", "stride", "padding", "no bias")
"""PEFT leaves dilation and padding mode out of A."""


class Net(nn.Module):
    """Two convolutions and a linear, with nothing of transformers about it."""

    def __init__(self, axes: int, **options) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[axes]
        self.first = conv(4, 6, 3, **options)
        self.second = conv(6, 8, 1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x).relu()).flatten(2).mean(-1))


def net(axes: int, shape: str = "plain", **more) -> Net:
    torch.manual_seed(0)
    return Net(axes, **(SHAPES[shape] | more)).eval()


def picture(axes: int) -> torch.Tensor:
    return torch.randn(2, 4, *[9, 10][:axes], generator=torch.Generator().manual_seed(1))


def slow(host: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The convolution of `host` with another `weight`, one window of its padded input after the other."""
    axes, stride, dilation = len(host.kernel_size), host.stride, host.dilation
    if host.padding == "same":
        each = [d * (k - 1) // 2 for d, k in zip(dilation, host.kernel_size, strict=True)]
    else:
        each = list(host.padding)
    mode = "constant" if host.padding_mode == "zeros" else host.padding_mode
    x = F.pad(x, [p for amount in reversed(each) for p in (amount, amount)], mode=mode)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, host.kernel_size, strict=True)]
    counts = [(size - r) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    y = torch.zeros(len(x), len(weight), *counts)
    for place in torch.cartesian_prod(*map(torch.arange, counts)).reshape(-1, axes).tolist():
        window = tuple(slice(at * s, at * s + r, d) for at, s, r, d in zip(place, stride, reach, dilation, strict=True))
        seen = x[(slice(None), slice(None), *window)]
        y[(slice(None), slice(None), *place)] = torch.einsum("nc...,oc...->no...", seen, weight).flatten(2).sum(-1)
    if host.bias is not None:
        y += host.bias.reshape(-1, *[1] * axes)
    return y


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_is_a_convolution_with_a_low_rank_update(axes, shape):
    model = peftctl.attach(net(axes, shape), LORA(r=3, alpha=6, target_modules=["first"]))
    assert torch.equal(model(picture(axes)), net(axes, shape)(picture(axes)))
    stir(model)
    host, adapter = model.first, adapters_of(model, "default")["first"]
    update = torch.stack(
        [adapter.lora_B.weight.flatten(1) @ kernel for kernel in adapter.lora_A.weight.flatten(2).unbind(-1)], dim=-1
    )
    expected = slow(host, picture(axes), host.weight + (6 / 3) * update.reshape(host.weight.shape))
    torch.testing.assert_close(host(picture(axes)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_merges(axes, shape):
    model = peftctl.attach(net(axes, shape), LORA(r=3, bias="all", target_modules=["first", "second"]))
    stir(model)
    expected = model(picture(axes))
    assert not torch.allclose(expected, net(axes, shape)(picture(axes)), atol=1e-2)
    torch.testing.assert_close(peftctl.merge(model)(picture(axes)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("shape", PEFT_IS_RIGHT)
@torch.no_grad()
def test_crosses_to_peft_and_back(axes, shape, tmp_path):
    bias = "none" if shape == "no bias" else "lora_only"
    ours = peftctl.attach(net(axes, shape), LORA(r=4, alpha=6, bias=bias, target_modules=["first", "out"]))
    stir(ours)
    peftctl.save(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(axes, shape), tmp_path / "ours").eval()
    torch.testing.assert_close(ours(picture(axes)), theirs(picture(axes)), rtol=1e-5, atol=1e-6)
    stir_lora(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peftctl.load(net(axes, shape), tmp_path / "theirs")
    assert not torch.allclose(again(picture(axes)), ours(picture(axes)), atol=1e-3)
    torch.testing.assert_close(again(picture(axes)), theirs(picture(axes)), rtol=1e-5, atol=1e-6)


def stir_lora(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(0.1)


@torch.no_grad()
def test_groups_are_crossed_as_in_peft_and_so_do_not_merge(tmp_path):
    ours = peftctl.attach(net(2, groups=2), LORA(r=4, target_modules=["first"]))
    stir(ours)
    peftctl.save(ours, tmp_path)
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = peft.PeftModel.from_pretrained(net(2, groups=2), tmp_path).eval()
    torch.testing.assert_close(ours(picture(2)), theirs(picture(2)), rtol=1e-5, atol=1e-6)
    with pytest.raises(NotMergeable, match="crosses the 2 groups"):
        peftctl.merge(ours)
    with pytest.raises(AdapterError, match="3 is no multiple of the 2 groups of a Conv2d"):
        peftctl.attach(net(2, groups=2), LORA(r=3, target_modules=["first"]))


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_starts_gaussian_or_not_at_all(groups):
    model = net(2, groups=groups)
    peftctl.attach(model, LORA(r=4, target_modules=["first"], init_weights="gaussian"))
    adapter = adapters_of(model, "default")["first"]
    assert float(adapter.lora_A.weight.std()) == pytest.approx(1 / 4, rel=0.2)
    assert torch.equal(model(picture(2)), net(2, groups=groups)(picture(2)))
    with pytest.raises(AdapterError, match="`first` is a Conv2d under a LoRAConv, for which there is no such start"):
        peftctl.attach(net(2), LORA(r=4, target_modules=["first"], init_weights="pissa"))


def test_all_linear_means_linears():
    model = peftctl.attach(net(2), LORA(r=2))
    assert set(adapters_of(model, "default")) == {"out"}


def test_a_convolution_that_computes_something_else_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.weight / self.weight.std(), self.bias)

    model = nn.Sequential(Standardised(4, 6, 3))
    with pytest.raises(AdapterError, match="Standardised computes more than its convolution"):
        peftctl.attach(model, LORA(r=2, target_modules=["0"]))


def test_half_precision_and_dropout():
    model = peftctl.attach(net(2).bfloat16(), LORA(r=2, dropout=0.5, target_modules=["first"]))
    stir(model)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    x = picture(2).bfloat16()
    assert model(x).dtype == torch.bfloat16
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
