"""Adapters that add a linear map: what they compute is what they merge, on every kind of linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from tiny import stir
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftctl
from peftctl.engine import hosts
from peftctl.engine.attach import adapters_of, trained
from peftctl.engine.update import Update
from peftctl.errors import AdapterError, NotMergeable

IN, OUT = 64, 128


def in_4_bits() -> nn.Module:
    return bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "conv1d": lambda: Conv1D(OUT, IN),
    "4 bits": in_4_bits,
}
METHODS: dict[str, dict[str, Any]] = {
    "vera": {"r": 8},
    "gralora": {"r": 8, "k": 4, "hybrid_r": 2},
    "mora": {"r": 3},  # a square of 24
    "qalora": {"r": 4, "group_size": 16},
}
X = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(5))


def adapted(method: str, host: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    fields = METHODS[method] | {"target_modules": ["0"]} | more
    return peftctl.attach(nn.Sequential(HOSTS[host]()), peftctl.METHODS[method](**fields))


def only(model: nn.Module) -> Update:
    """The one adapter of `model`."""
    [adapter] = adapters_of(model, "default").values()
    assert isinstance(adapter, Update)
    return adapter


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_it_adds_its_matrix_times_its_strength(method, host):
    model = adapted(method, host)
    with peftctl.bare(model):
        base = model(X)
    assert torch.equal(model(X), base)
    stir(model)
    peftctl.activate(model, {"default": 0.5})
    adapter = only(model)
    assert adapter.matrix().shape == (OUT, IN)
    assert adapter.matrix().abs().max() > 0.01
    torch.testing.assert_close(model(X) - base, 0.5 * X @ adapter.matrix().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_a_gradient(method, host):
    model = adapted(method, host)
    stir(model)
    model(X).square().sum().backward()
    assert trained(model)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_it_merges_as_the_host_stores_its_weight(method):
    for host in ("linear", "conv1d"):
        model = adapted(method, host)
        stir(model)
        before, y = model[0].weight.detach().clone(), model(X)
        update = only(model).matrix()
        peftctl.merge(model)
        torch.testing.assert_close(model[0].weight - before, hosts.stored(model[0], update), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_it_does_not_merge_into_4_bits(method):
    model = adapted(method, "4 bits")
    stir(model)
    y = model(X)
    with pytest.raises(NotMergeable, match="stored in 4 or 8 bits"):
        peftctl.merge(model)
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_on_the_update_in_training_only(method):
    model = adapted(method, "linear", dropout=0.5)
    stir(model)
    assert torch.equal(model.eval()(X), model(X))
    assert not torch.equal(model.train()(X), model(X))
    with peftctl.bare(model):
        assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_is_no_host_for_it(method):
    model = nn.Sequential(nn.Embedding(10, IN), nn.Linear(IN, OUT))
    with pytest.raises(AdapterError, match=r"^method.target_modules: `0` is a Embedding, no linear"):
        peftctl.attach(model, peftctl.METHODS[method](**METHODS[method], target_modules=["0", "1"]))
    assert not adapters_of(model)


@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_where_another_ended(method):
    earlier = adapted(method, "linear")
    stir(earlier)
    later = adapted(method, "linear")
    only(later).continue_from(only(earlier))
    assert torch.equal(only(later).matrix(), only(earlier).matrix())


@pytest.mark.parametrize(
    ("method", "before", "now"),
    [
        ("vera", {"save_projection": False}, {"save_projection": False, "projection_prng_key": 1}),
        ("gralora", {}, {"alpha": 8}),
        ("mora", {}, {"compression": "sharing"}),
        ("qalora", {}, {"use_rslora": True}),
    ],
)
def test_it_does_not_go_on_with_tensors_that_mean_something_else(method, before, now):
    earlier = adapted(method, "linear", **before)
    stir(earlier)
    later = adapted(method, "linear", **now)
    with pytest.raises(AdapterError, match="would be another update here"):
        only(later).continue_from(only(earlier))


@pytest.mark.parametrize(
    ("method", "word"), [("vera", "vera_only"), ("gralora", "gralora_only"), ("qalora", "lora_only")]
)
def test_biases_of_the_adapted_modules_or_of_all(method, word):
    def biases(bias: str) -> set[str]:
        model = nn.Sequential(nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.Linear(OUT, IN))
        fields = METHODS[method] | {"target_modules": ["0"], "bias": bias}
        peftctl.attach(model, peftctl.METHODS[method](**fields))
        return {name.partition(".")[0] for name in trained(model) if name.endswith("default.bias")}

    assert biases("none") == set()
    assert biases(word) == {"0"}
    assert biases("all") == {"0", "1", "2"}
