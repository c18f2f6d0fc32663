"""MoRA: both of its equations written out, its size, and the folder that it is kept in."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import build, logits, stir
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError

MORA = peftctl.METHODS["mora"]
SHAPES = [(32, 32), (32, 16), (48, 32), (30, 33), (7, 90), (90, 7)]
"""Inputs and outputs: multiples of the matrix and not, far more of one than of the other."""


def sharing(x: Tensor, M: Tensor, outputs: int) -> Tensor:
    """Equation 6, entry by entry: x [in] -> [out]."""
    m, pieces = len(M), math.ceil(len(x) / len(M))
    small = [sum(x[(i + p * m) % len(x)] for p in range(pieces)) for i in range(m)]
    y = [sum(M[o, i] * small[i] for i in range(m)) for o in range(m)]
    return torch.stack([y[o % m] for o in range(outputs)])


def rotation(x: Tensor, M: Tensor, outputs: int) -> Tensor:
    """Equation 9, entry by entry: x [in] -> [out]."""
    m, y = len(M), []
    for p in range(math.ceil(len(x) / m)):
        piece = [x[(p * m + i) % len(x)] for i in range(m)]
        turned = [torch.tensor(0.0)] * m
        for i in range(m // 2):
            angle = p * 10000 ** (-2 * i / m)
            a, b = piece[i], piece[i + m // 2]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + m // 2] = a * math.sin(angle) + b * math.cos(angle)
        y += [sum(M[o, i] * turned[i] for i in range(m)) for o in range(m)]
    return torch.stack([y[o % len(y)] for o in range(outputs)])


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("compression", "slow"), [("sharing", sharing), ("rotation", rotation)])
def test_the_equation(compression, slow, inputs, outputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    peftctl.attach(model, MORA(r=1, compression=compression, target_modules=["0"]))
    stir(model)
    [adapter] = adapters_of(model, "default").values()
    for x in torch.randn(2, inputs):
        update = slow(x, adapter.mora_M.weight, outputs)
        torch.testing.assert_close(model(x) - (model[0].weight @ x + model[0].bias), update, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.matrix() @ x, update)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_merged_is_what_was_computed(inputs, outputs):
    for compression in ("sharing", "rotation"):
        model = nn.Sequential(nn.Linear(inputs, outputs))
        peftctl.attach(model, MORA(r=2, compression=compression, target_modules=["0"]))
        stir(model)
        x = torch.randn(5, inputs)
        expected = model(x)
        torch.testing.assert_close(peftctl.merge(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_the_matrix_has_as_many_entries_as_a_lora():
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig())
    peftctl.attach(skeleton, MORA(r=8, target_modules=["q_proj", "up_proj"]))
    sizes = {tuple(p.shape) for p in trained(skeleton).values()}
    assert sizes == {(256, 256), (346, 346)}  # sqrt(8192 * 8) = 256, sqrt(15104 * 8) = 347.6, made even
    assert sum(p.numel() for p in trained(skeleton).values()) == 32 * (256**2 + 346**2)


def test_sharing_takes_odd_sizes():
    model = peftctl.attach(build("llama"), MORA(r=1, compression="sharing", target_modules=["down_proj"]))
    assert {tuple(p.shape) for p in trained(model).values()} == {(8, 8)}  # sqrt(80) = 8.9
    model = peftctl.attach(build("llama"), MORA(r=2, compression="sharing", target_modules=["v_proj"]))
    assert {tuple(p.shape) for p in trained(model).values()} == {(9, 9)}  # sqrt(96) = 9.8


def test_its_rank_is_higher_than_that_of_a_lora_of_its_size():
    for compression, rank in (("rotation", 22), ("sharing", 22)):
        model = peftctl.attach(build("llama"), MORA(r=8, compression=compression, target_modules=["q_proj"]))
        stir(model)
        for adapter in adapters_of(model, "default").values():
            assert torch.linalg.matrix_rank(adapter.matrix()) >= rank


def test_pieces_count_only_with_rotation():
    """Sharing cannot tell x from x with its pieces exchanged; rotation can."""
    for compression, told in (("sharing", False), ("rotation", True)):
        model = nn.Sequential(nn.Linear(32, 32, bias=False))
        model[0].weight.data.zero_()
        peftctl.attach(model, MORA(r=1, compression=compression, target_modules=["0"]))
        stir(model)
        x = torch.randn(1, 32)
        y, swapped = model(x), model(x.roll(8, -1))
        assert torch.allclose(y.sum(), swapped.sum(), atol=1e-5) != told


@pytest.mark.parametrize("compression", ["rotation", "sharing"])
def test_the_folder_says_how_to_read_it(compression, tmp_path):
    model = peftctl.attach(build("llama"), MORA(r=2, compression=compression, dropout=0.1))
    stir(model)
    peftctl.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    told = {"peft_type": "MORA", "r": 2, "compression": compression, "mora_dropout": 0.1}
    assert told.items() <= config.items()
    assert torch.equal(logits(peftctl.load(build("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 3}, "mora_M.weight` has shape"),
        ({"r": 1.5}, "r: expected a whole number"),
        ({"compression": "rope"}, "compression: expected one of rotation, sharing; got `rope`"),
        ({"mora_dropout": 2}, "mora_dropout: expected a number from 0 to 1"),
        ({"lora_alpha": 2}, "lora_alpha: `2` is not supported"),
    ],
)
def test_a_folder_that_contradicts_itself(changes, text, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), MORA(r=2)), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    model = build("llama")
    with pytest.raises(AdapterError, match=text):
        peftctl.load(model, tmp_path)
    assert not adapters_of(model)
