"""LoRA against HF PEFT: our folders load there, theirs load here, with equal logits and greedy tokens."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import build, greedy, logits, stir

import peftctl
from peftctl.engine.disk import load, save

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "intermediate.dense"],
}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared", "bert": "word_embeddings"}
LAYER_Q = {
    "llama": "0.self_attn.q_proj",
    "gpt2": "h.0.attn.c_attn",
    "t5": "0.layer.0.SelfAttention.q",
    "bert": "0.attention.self.query",
}
HEAD = {"llama": "lm_head", "gpt2": "lm_head", "t5": "lm_head", "bert": "classifier"}

# our fields, PEFT's fields
VARIANTS = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "bias lora_only": ({"bias": "lora_only"}, {"bias": "lora_only"}),
    "bias all": ({"bias": "all"}, {"bias": "all"}),
    "patterns": (
        lambda name: {"rank_pattern": {LAYER_Q[name].replace(".", r"\."): 6}, "alpha_pattern": {LAYER_Q[name]: 5}},
        lambda name: {"rank_pattern": {LAYER_Q[name].replace(".", r"\."): 6}, "alpha_pattern": {LAYER_Q[name]: 5}},
    ),
    "head": (lambda name: {"modules_to_save": [HEAD[name]]}, lambda name: {"modules_to_save": [HEAD[name]]}),
    "embedding": (
        lambda name: {"target_modules": [*TARGETS[name], EMBEDDING[name]]},
        lambda name: {"target_modules": [*TARGETS[name], EMBEDDING[name]]},
    ),
    "all-linear": ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "layers": ({"layers_to_transform": [1]}, {"layers_to_transform": [1]}),
}
CASES = [(name, variant) for name in TARGETS for variant in VARIANTS]


def options(name: str, variant: str) -> tuple[dict, dict]:
    ours, theirs = (part(name) if callable(part) else part for part in VARIANTS[variant])
    ours = {"r": 4, "alpha": 8, "target_modules": TARGETS[name]} | ours
    tasks = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
    theirs = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[name],
        "task_type": tasks.get(name, "CAUSAL_LM"),
    } | theirs
    return ours, theirs


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module, name: str) -> None:
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    if name != "bert":
        assert greedy(ours) == greedy(theirs)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_peft_reads_what_we_save(name, variant, tmp_path):
    fields, _ = options(name, variant)
    if name == "bert" and "modules_to_save" not in fields:
        fields["modules_to_save"] = ["classifier"]  # PEFT adds it to every sequence classifier and wants its tensors
    base = logits(build(name))
    ours = peftctl.attach(build(name), peftctl.METHODS["lora"](**fields))
    stir(ours)
    save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert not torch.allclose(logits(ours), base, atol=1e-3)
    assert_same(ours, theirs, name)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_we_read_what_peft_saves(name, variant, tmp_path):
    _, fields = options(name, variant)
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(**fields)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load(build(name), tmp_path).eval()
    assert_same(ours, theirs, name)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_read_is_written_back_as_it_was(name, tmp_path):
    _, fields = options(name, "patterns")
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(**fields)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    save(load(build(name), tmp_path / "theirs"), tmp_path / "ours")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_config_has_exactly_the_keys_of_peft(tmp_path):
    theirs = peft.get_peft_model(build("gpt2"), peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "theirs")
    save(
        peftctl.attach(build("gpt2"), peftctl.METHODS["lora"](r=4, alpha=8, target_modules=["c_attn"])),
        tmp_path / "ours",
    )
    a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    assert a.keys() == b.keys()
    differing = {key for key in a if a[key] != b[key]}
    assert differing <= {"target_modules"}
