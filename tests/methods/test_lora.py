"""LoRA's own arithmetic: scale, groups, dropout, embeddings, and how many parameters it trains."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from tiny import ZOO, build, logits, stir
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, MT5Config
from transformers import MT5ForConditionalGeneration as MT5

import peftctl
from peftctl.engine.attach import adapters_of, trained

LORA = peftctl.METHODS["lora"]
LLAMA_7B = LlamaConfig()  # its defaults are those of the first 7B model
MT0_LARGE = MT5Config(
    vocab_size=250112, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu"
)


@pytest.mark.parametrize(
    ("model", "fields", "parameters"),
    [
        (lambda: LlamaForCausalLM(LLAMA_7B), {"r": 8, "target_modules": ["q_proj", "v_proj"]}, 4_194_304),
        (lambda: LlamaForCausalLM(LLAMA_7B), {"r": 16, "target_modules": "all-linear"}, 39_976_960),
        (lambda: MT5(MT0_LARGE), {"r": 8, "target_modules": ["q", "v"]}, 2_359_296),
    ],
)
def test_how_many_parameters_published_models_train(model, fields, parameters):
    with torch.device("meta"):
        skeleton = model()
    counted = sum(p.numel() for p in trained(peftctl.attach(skeleton, LORA(**fields))).values())
    assert counted == parameters


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / math.sqrt(4))])
def test_scale(rslora, scale):
    model = peftctl.attach(build("llama"), LORA(r=4, alpha=12, use_rslora=rslora, target_modules=["q_proj"]))
    stir(model)
    x = torch.randn(2, 3, 32)
    for site, adapter in adapters_of(model, "default").items():
        host = model.get_submodule(site)
        expected = x @ (host.weight + scale * adapter.lora_B.weight @ adapter.lora_A.weight).T
        torch.testing.assert_close(host(x), expected, rtol=1e-5, atol=1e-5)


def test_scale_follows_rank_and_alpha_of_each_module():
    method = LORA(r=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 20}, use_rslora=True)
    assert method.scale("model.layers.0.self_attn.q_proj") == pytest.approx(8 / math.sqrt(2))
    assert method.scale("model.layers.0.self_attn.v_proj") == pytest.approx(20 / math.sqrt(4))
    assert method.scale("model.layers.0.self_attn.k_proj") == pytest.approx(8 / math.sqrt(4))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("called", ["default", "lora_B"])
def test_lora_plus_puts_every_parameter_into_one_group(name, called):
    targets = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared", "bert": "word_embeddings"}[name]
    linears = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q", "bert": "query"}[name]
    head = "classifier" if name == "bert" else "lm_head"
    method = LORA(r=4, bias="all", modules_to_save=[head], target_modules=[targets, linears], lora_plus_ratio=16.0)
    model = peftctl.attach(build(name), method, called)
    named = trained(model)
    slow, fast = method.groups(named, 1e-3)
    assert (slow["lr"], fast["lr"]) == (1e-3, pytest.approx(16e-3))
    ids = [id(p) for group in (slow, fast) for p in group["params"]]
    assert sorted(ids) == sorted(map(id, named.values()))
    in_fast = {
        key.partition(f".adapters.{called}.")[2] for key, p in named.items() if id(p) in set(map(id, fast["params"]))
    }
    assert in_fast == {"lora_B.weight", "lora_embedding_B"}


def test_without_lora_plus_there_is_one_group():
    model = peftctl.attach(build("llama"), LORA(r=4))
    (group,) = LORA(r=4).groups(trained(model), 2e-4)
    assert group["lr"] == 2e-4
    assert {id(p) for p in group["params"]} == {id(p) for p in trained(model).values()}


def test_dropout_acts_on_the_adapter_in_training_only():
    model = peftctl.attach(build("llama"), LORA(r=4, dropout=0.5, target_modules=["q_proj"]))
    host = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    assert torch.equal(model.train() and host(x), host(x))  # B is zero: nothing of the base is dropped
    stir(model)
    assert not torch.equal(host(x), host(x))
    kept = LORA(r=4, target_modules=["q_proj"])
    assert adapters_of(peftctl.attach(build("llama").train(), kept), "default").popitem()[1].dropout.p == 0
    model.eval()
    assert torch.equal(host(x), host(x))


def test_dropout_keeps_the_expected_value():
    model = peftctl.attach(build("llama"), LORA(r=4, dropout=0.5, target_modules=["q_proj"]))
    stir(model)
    host = model.model.layers[0].self_attn.q_proj
    x = torch.ones(1, 32)
    expected = host(x)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = host.train()(x.expand(20_000, 32)).mean(0, keepdim=True)
    torch.testing.assert_close(mean, expected.detach(), rtol=0.05, atol=0.05)


def gemma() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, num_key_value_heads=2, **sizes, **ids)).eval()


def test_embeddings_that_are_scaled_agree_with_peft_and_with_their_merge(tmp_path):
    assert gemma().model.embed_tokens.embed_scale == pytest.approx(math.sqrt(32))
    ours = peftctl.attach(gemma(), LORA(r=4, target_modules=["embed_tokens", "q_proj"]))
    stir(ours)
    peftctl.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(gemma(), tmp_path).eval()
    expected = logits(ours)
    assert not torch.allclose(expected, logits(gemma()), atol=1e-2)
    torch.testing.assert_close(expected, logits(theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(peftctl.merge(ours)), expected, rtol=1e-4, atol=1e-5)
