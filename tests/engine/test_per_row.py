"""Rows of one batch with adapters of their own: each computes what it computes alone."""

from __future__ import annotations

import pytest
import torch
from methods.settings import SETTINGS, made
from tiny import build, inputs, stir
from torch import Tensor, nn

import peftctl
from peftctl.errors import AdapterError

METHODS = [method for method, setting in SETTINGS.items() if setting.host_level and "llama" in setting.zoo]


def two_adapters(method: str, shape: str = "llama") -> nn.Module:
    model = build(shape)
    for seed, name in enumerate(("a", "b")):
        peftctl.attach(model, made(method, shape), name)
        stir(model, seed)
    return model


@torch.no_grad()
def row_logits(model: nn.Module, row: int) -> Tensor:
    return model(**{key: value[row : row + 1] for key, value in inputs(model, rows=4).items()}).logits[0]


@torch.no_grad()
def expected(model: nn.Module, names: list[str | None]) -> list[Tensor]:
    """Each row alone, with its adapter active."""
    found = []
    for row, name in enumerate(names):
        peftctl.activate(model, [name] if name else [])
        found.append(row_logits(model, row))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_each_row_computes_what_it_computes_alone(method):
    model = two_adapters(method)
    names = ["b", None, "a", "b"]
    alone = expected(model, names)
    peftctl.activate(model, ["a"])
    with torch.no_grad(), peftctl.rows(model, names):
        together = model(**inputs(model, rows=4)).logits
    for row, one in enumerate(alone):
        torch.testing.assert_close(together[row], one, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], expected(model, ["a"])[0], atol=1e-3)


@pytest.mark.parametrize("shape", ["gpt2", "t5", "bert"])
def test_other_shapes(shape):
    model = two_adapters("lora", shape)
    names = ["a", "b", None, "a"]
    alone = expected(model, names)
    with torch.no_grad(), peftctl.rows(model, names):
        together = model(**inputs(model, rows=4)).logits
    for row, one in enumerate(alone):
        torch.testing.assert_close(together[row], one, rtol=1e-5, atol=1e-5)


def test_beams_follow_their_row():
    model = two_adapters("lora")
    batch, names = inputs(model), ["b", None]
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    alone = []
    for row, name in enumerate(names):
        peftctl.activate(model, [name] if name else [])
        alone.append(model.generate(**{k: v[row : row + 1] for k, v in batch.items()}, **beams)[0])
    with peftctl.rows(model, names):
        together = model.generate(**batch, **beams)
    assert together.tolist() == [one.tolist() for one in alone]


def test_afterwards_everything_is_as_before():
    model = two_adapters("lora")
    peftctl.activate(model, {"a": 0.5, "b": 1.0})
    before = row_logits(model, 0)
    with peftctl.rows(model, ["a"]):
        pass
    with pytest.raises(ZeroDivisionError), peftctl.rows(model, ["a"]):
        raise ZeroDivisionError
    assert torch.equal(row_logits(model, 0), before)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "c"], "adapter `c`: not attached"),
        ([], "no names"),
        (["a", "b", "a"], "3 names for a batch of 4 rows"),
    ],
)
def test_what_cannot_be(names, message):
    model = two_adapters("lora")
    with pytest.raises(AdapterError, match=message), peftctl.rows(model, names):
        model(**inputs(model, rows=4))


def test_a_block_cannot_take_rows_apart():
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"](modules_to_save=["mlp"]), "a")
    with pytest.raises(AdapterError, match=r"`model\.layers\.0\.mlp`, which has parts"), peftctl.rows(model, ["a"]):
        pass


@torch.no_grad()
def test_the_base_alone_inside_the_context():
    model = two_adapters("lora")
    with peftctl.bare(model):
        base = model(**inputs(model, rows=2)).logits
    with peftctl.rows(model, ["a", "b"]):
        together = model(**inputs(model, rows=2)).logits
        with peftctl.bare(model):
            torch.testing.assert_close(model(**inputs(model, rows=2)).logits, base, rtol=0, atol=0)
        torch.testing.assert_close(model(**inputs(model, rows=2)).logits, together, rtol=0, atol=0)
    assert not torch.allclose(together, base, atol=1e-3)
