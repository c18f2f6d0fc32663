"""What the contract asks of every method, asked of LoRA's rarer forms: away from zero, on convolutions, on tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import inputs, llama, stir
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import peftctl
from peftctl.engine.attach import adapters_of, stacks, trained

LORA = peftctl.METHODS["lora"]


def vit() -> nn.Module:
    """Its patches come from a convolution."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


FORMS = {
    "pissa": (lambda: llama(tied=True), {"init_weights": "pissa"}),
    "tokens": (lambda: llama(tied=True), {"trainable_token_indices": [13, 59, 5]}),
    "convolution": (vit, {"target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"]}),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def base(form: str) -> nn.Module:
    torch.manual_seed(0)
    return FORMS[form][0]().eval()


def attached(form: str, name: str = "default") -> nn.Module:
    return peftctl.attach(base(form), LORA(r=4, **FORMS[form][1]), name)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**inputs(model)).logits


def test_learns_and_touches_only_what_it_owns(form):
    model = attached(form)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    labels = torch.arange(logits(model).shape[:-1].numel()) % 3
    update = torch.optim.AdamW(trained(model).values(), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(**inputs(model)).logits.flatten(0, -2), labels)
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    assert {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} == set(trained(model))


def test_saves_loads_merges_and_detaches(form, tmp_path):
    model = attached(form)
    stir(model)
    expected = logits(model)
    peftctl.save(model, tmp_path)
    torch.testing.assert_close(logits(peftctl.load(base(form), tmp_path)), expected, rtol=1e-5, atol=1e-6)
    merged = peftctl.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not list(stacks(merged))
    peftctl.detach(model)
    assert torch.equal(logits(model), logits(base(form)))
    assert not any("forward" in vars(module) for module in model.modules())


def test_merging_can_be_undone(form):
    model = attached(form)
    stir(model)
    expected, tied = logits(model), getattr(model.config, "tie_word_embeddings", None)
    peftctl.unmerge(peftctl.merge(model, keep=True))
    assert torch.equal(logits(model), expected)
    assert getattr(model.config, "tie_word_embeddings", None) == tied


def test_copies_and_pickles_are_independent(form):
    model = attached(form)
    stir(model)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        stir(twin, seed=9)
        assert torch.equal(logits(model), expected)
        assert not torch.allclose(logits(twin), expected, atol=1e-3)


def test_a_copy_of_tied_rows_follows_the_copy():
    twin = copy.deepcopy(attached("tokens"))
    found = adapters_of(twin, "default")
    assert found["lm_head"].follows is found["model.embed_tokens"]


def test_compiles(form):
    model = attached(form)
    stir(model)
    expected = logits(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(**inputs(model)).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


def test_several_are_switched(form):
    model = attached(form, "a")
    stir(model)
    alone = logits(model)
    peftctl.attach(model, LORA(r=2, target_modules=["q_proj"]), "b")
    stir(model, seed=3)
    peftctl.activate(model, ["a", "b"])
    assert not torch.allclose(logits(model), alone, atol=1e-3)
    peftctl.activate(model, ["a"])
    assert torch.equal(logits(model), alone)
    with peftctl.bare(model):
        assert torch.equal(logits(model), logits(base(form)))


@pytest.mark.parametrize("how", ["pissa", "eva", "trainable tokens"])
def test_ranks_by_gradient_go_with_it(how):
    from methods.test_lora_starts import sample

    fields = {"trainable_token_indices": [4, 5]} if how == "trainable tokens" else {"init_weights": how}
    model = peftctl.attach(base("tokens"), LORA(r=2, rank_allocation="gradient", **fields), sample=sample())
    ranks = {a.lora_A.weight.shape[0] for a in adapters_of(model, "default").values() if hasattr(a, "lora_A")}
    assert len(ranks) > 1
    torch.testing.assert_close(logits(model), logits(base("tokens")), rtol=0, atol=1e-6)
