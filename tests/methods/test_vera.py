"""VeRA's own arithmetic: its equation, the one pair of matrices that all linears share, and how little it trains."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, logits, stir
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine.attach import adapters_of, live, trained
from peftctl.errors import AdapterError

VERA = peftctl.METHODS["vera"]


def test_how_many_parameters_llama_7b_trains():
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig())  # its defaults are those of the first 7B model
    model = peftctl.attach(skeleton, VERA(target_modules=["q_proj", "v_proj"]))
    assert sum(p.numel() for p in trained(model).values()) == 32 * 2 * (4096 + 256) == 278_528


def test_the_equation():
    model = peftctl.attach(build("llama"), VERA(r=6, target_modules=["q_proj", "v_proj", "down_proj"]))
    stir(model)
    shapes = set()
    for site, adapter in adapters_of(model, "default").items():
        host = model.get_submodule(site)
        out_features, in_features = host.weight.shape
        A = adapter.projections.vera_A[:, :in_features]
        B = adapter.projections.vera_B[:out_features]
        update = torch.diag(adapter.vera_lambda_b) @ B @ torch.diag(adapter.vera_lambda_d) @ A
        x = torch.randn(2, 3, in_features)
        torch.testing.assert_close(host(x), x @ (host.weight + update).T, rtol=1e-5, atol=1e-5)
        shapes.add((out_features, in_features))
    assert shapes == {(32, 32), (16, 32), (32, 48)}
    assert adapter.projections.vera_A.shape == (6, 48)
    assert adapter.projections.vera_B.shape == (32, 6)


@pytest.mark.parametrize("d_initial", [0.3, 1])
def test_start(d_initial):
    model = peftctl.attach(build("llama"), VERA(r=6, d_initial=d_initial))
    for adapter in adapters_of(model, "default").values():
        assert torch.equal(adapter.vera_lambda_d, torch.full((6,), float(d_initial)))
        assert not adapter.vera_lambda_b.any()


def test_all_linears_share_two_frozen_matrices():
    model = peftctl.attach(build("llama"), VERA(r=6))
    shared = {id(adapter.projections) for adapter in adapters_of(model, "default").values()}
    assert len(shared) == 1
    assert not any("vera_A" in name or "vera_B" in name for name in trained(model))
    assert sorted(name.rpartition(".")[2] for name in live(model) if "projections" in name) == ["vera_A", "vera_B"]
    peftctl.attach(model, VERA(r=4, projection_prng_key=1), "other")
    other = next(iter(adapters_of(model, "other").values())).projections
    assert other.vera_A.shape[0] == 4
    assert id(other) not in shared


def test_matrices_follow_from_their_seed_alone():
    def matrices(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        adapters = adapters_of(peftctl.attach(build("llama"), VERA(r=6, projection_prng_key=seed)), "default")
        return list(next(iter(adapters.values())).projections.buffers())

    first, again, other = matrices(3), matrices(3), matrices(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for matrix in first:  # uniform: the largest is close to the bound
        assert 0.9 < matrix.abs().max() / (6 / matrix.shape[1]) ** 0.5 <= 1


@pytest.mark.parametrize("kept", [True, False])
def test_the_file_holds_the_matrices_once_or_not_at_all(kept, tmp_path):
    model = peftctl.attach(build("llama"), VERA(r=6, save_projection=kept))
    stir(model)
    peftctl.save(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    shared = {"base_model.vera_A", "base_model.vera_B"}
    assert {key for key in keys if not key.startswith("base_model.model.")} == (shared if kept else set())
    assert {key.rpartition(".")[2] for key in keys - shared} == {"vera_lambda_b", "vera_lambda_d"}
    assert torch.equal(logits(peftctl.load(build("llama"), tmp_path)), logits(model))


def test_saved_matrices_count_more_than_the_seed(tmp_path):
    model = peftctl.attach(build("llama"), VERA(r=6))
    stir(model)
    next(iter(adapters_of(model, "default").values())).projections.vera_A.mul_(2)
    peftctl.save(model, tmp_path)
    assert torch.equal(logits(peftctl.load(build("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("changes", "tensors", "text"),
    [
        ({"r": 7}, {}, "r: `model.layers.0.mlp.down_proj` has rank 6, the config says 7"),
        ({"r": 0}, {}, "r: expected a whole number of at least 1; got `0`"),
        ({"projection_prng_key": -1}, {}, "projection_prng_key: expected a number from 0"),
        ({"projection_prng_key": 0.5}, {}, "projection_prng_key: expected a whole number of at least 0; got `0.5`"),
        ({"bias": "lora_only"}, {}, "bias: expected one of none, all, vera_only; got `lora_only`"),
        ({"save_projection": "yes"}, {}, "save_projection: expected true or false; got `yes`"),
        ({"save_projection": False}, {}, "`base_model.vera_A` is not part of this adapter"),
        ({"lora_alpha": 3}, {}, "lora_alpha: `3` is not supported"),
        ({}, {"base_model.vera_B": None}, "`base_model.vera_B` is missing"),
        ({}, {"base_model.vera_A": (6, 49)}, r"`base_model.vera_A` has shape \[6, 49\], the model wants \[6, 48\]"),
    ],
)
def test_a_folder_that_contradicts_itself(changes, tensors, text, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), VERA(r=6)), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    held = load_file(weights)
    for key, shape in tensors.items():
        del held[key]
        held |= {} if shape is None else {key: torch.zeros(shape)}
    save_file(held, weights)
    model = build("llama")
    with pytest.raises(AdapterError, match=text):
        peftctl.load(model, tmp_path)
    assert not adapters_of(model)


def test_a_folder_without_its_matrices_asks_for_no_large_ones(tmp_path):
    model = peftctl.attach(build("llama"), VERA(r=4, save_projection=False))
    peftctl.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 10**6}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wide = {key: torch.zeros(10**6) if key.endswith("lambda_d") else t for key, t in tensors.items()}
    save_file(wide, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="r: expected a number from 0 to 16384"):
        peftctl.load(build("llama"), tmp_path)
