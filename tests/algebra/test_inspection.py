from __future__ import annotations

import math

import pytest
import torch
from methods.settings import SETTINGS, made
from tiny import build, stir

import peftctl
from peftctl.algebra.diff import difference
from peftctl.algebra.inspection import inspected
from peftctl.algebra.lora_folder import read_lora_folder
from peftctl.errors import AdapterError


def product(update):
    return update.scale * (update.B.double() @ update.A.double())


def test_the_facts_of_a_lora(make):
    folder = make(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, use_rslora=True)
    found = inspected(folder)
    assert (found["method"], found["peft_type"], found["dtype"]) == ("lora", "LORA", ["F32"])
    assert found["sites"] == {"count": 4, "by_name": {"q_proj": 2, "v_proj": 2}}
    assert found["parameters"] == 2 * (4 * 32 + 32 * 4) + 2 * (2 * 32 + 16 * 2)
    assert found["rank"] == {"min": 2, "mean": 3.0, "max": 4}
    assert found["settings"]["use_rslora"] is True
    assert {"r", "alpha"} <= found["settings"].keys()
    assert "dropout" not in found["settings"]
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_norms_and_ranks_are_those_of_the_products(make):
    folder = make(use_rslora=True)
    updates, found = read_lora_folder(folder).updates, inspected(folder)
    for figures in found["updates"]:
        matrix = product(updates[figures["site"]])
        s = torch.linalg.svdvals(matrix)[:4]
        shares = s / s.sum()
        assert figures["norm"] == pytest.approx(float(matrix.norm()), rel=1e-6)
        assert figures["effective_rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)
        energy = float(s[:2].square().sum() / s.square().sum())
        assert figures["energy_of_first"] == {
            "1": pytest.approx(float(s[0] ** 2 / (s**2).sum())),
            "2": pytest.approx(energy),
        }
    total = sum(float(product(update).square().sum()) for update in updates.values())
    assert found["norm"] == pytest.approx(math.sqrt(total))


def test_an_untrained_adapter_is_told_as_zero(tmp_path):
    peftctl.save(peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=2)), tmp_path / "new")
    found = inspected(tmp_path / "new")
    assert found["norm"] == 0
    assert {figures["effective_rank"] for figures in found["updates"]} == {0.0}


@pytest.mark.parametrize("method", sorted(SETTINGS.keys() & peftctl.METHODS.keys()))
def test_every_method_has_its_facts(tmp_path, method):
    shape = "gpt2" if method == "bitfit" else "llama"
    model = peftctl.attach(build(shape), made(method, shape))
    stir(model)
    found = inspected(peftctl.save(model, tmp_path / "adapter"))
    assert found["method"] == {"delta_lora": "lora"}.get(method, method)  # saved as the LoRA that it is by then
    assert found["parameters"] > 0
    assert isinstance(found["settings"], dict)


def test_a_distance_is_that_of_the_products(make):
    folders = [make(0, target_modules=["q_proj", "k_proj"]), make(1, target_modules=["k_proj", "v_proj"], r=6, alpha=5)]
    a, b = (read_lora_folder(folder) for folder in folders)
    found = difference(a, b)
    assert [site["site"].rpartition(".")[2] for site in found["sites"]] == ["k_proj", "k_proj"]
    for site in found["sites"]:
        one, two = product(a.updates[site["site"]]), product(b.updates[site["site"]])
        assert site["distance"] == pytest.approx(float((one - two).norm() / one.norm()), rel=1e-8)
        cosine = float((one * two).sum() / (one.norm() * two.norm()))
        assert site["cosine"] == pytest.approx(cosine, rel=1e-6)
    assert {name.rpartition(".")[2] for name in found["only_in_first"]} == {"q_proj"}
    assert {name.rpartition(".")[2] for name in found["only_in_second"]} == {"v_proj"}
    assert found["settings"]["r"] == [4, 6]
    every = a.updates.keys() | b.updates.keys()
    zero = torch.zeros(())
    pairs = [tuple(product(f.updates[s]) if s in f.updates else zero for f in (a, b)) for s in every]
    apart = math.sqrt(sum(float((one - two).square().sum()) for one, two in pairs))
    norm = math.sqrt(sum(float(one.square().sum()) for one, _ in pairs))
    assert found["overall"]["distance"] == pytest.approx(apart / norm, rel=1e-8)


def test_the_same_function_from_other_factors_is_no_distance(make):
    adapter = read_lora_folder(make())
    turned = read_lora_folder(adapter.place)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    for site, update in turned.updates.items():
        turned.updates[site] = type(update)(rotation @ update.A, update.B @ rotation.T, update.scale, update.leaves)
    found = difference(adapter, turned)
    assert found["overall"]["distance"] < 1e-6
    assert found["overall"]["cosine"] == pytest.approx(1.0)
    assert (found["settings"], found["others_differ"], found["base"]["same"]) == ({}, [], True)


def test_adapters_of_models_of_other_sizes_are_refused(make):
    a, b = read_lora_folder(make(target_modules=["q_proj"])), read_lora_folder(make(1, target_modules=["q_proj"]))
    site = next(iter(b.updates))
    b.updates[site] = type(b.updates[site])(torch.zeros(4, 40), torch.zeros(32, 4))
    with pytest.raises(AdapterError, match=r"q_proj` is \[32, 40\], in .* \[32, 32\]"):
        difference(a, b)
