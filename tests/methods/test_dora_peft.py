"""DoRA against HF PEFT: our folders load there, theirs load here, with equal logits, greedy tokens and gradients."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from methods.oracle import TASKS, peft_reads_ours, we_read_peft, written_back
from tiny import build, inputs, stir

import peftctl
from peftctl.engine.attach import adapters_of, methods
from peftctl.engine.disk import save
from peftctl.engine.tensor_file import PREFIX
from peftctl.errors import AdapterError

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "intermediate.dense"],
}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared", "bert": "word_embeddings"}
VARIANTS = {
    "plain": lambda name: {},
    "rslora": lambda name: {"use_rslora": True},
    "bias": lambda name: {"bias": "all"},
    "patterns": lambda name: {"rank_pattern": {TARGETS[name][0]: 6}, "alpha_pattern": {TARGETS[name][-1]: 5}},
    "embedding": lambda name: {"target_modules": [*TARGETS[name], EMBEDDING[name]]},
}
CASES = [(name, variant) for name in TARGETS for variant in VARIANTS]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_peft_reads_what_we_save(name, variant, tmp_path):
    fields = {"r": 4, "alpha": 8, "target_modules": TARGETS[name]} | VARIANTS[variant](name)
    fields |= {"modules_to_save": ["classifier"]} if name == "bert" else {}
    peft_reads_ours(name, "dora", fields, tmp_path)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_we_read_what_peft_saves_and_write_it_back(name, variant, tmp_path):
    fields = {"r": 4, "target_modules": TARGETS[name]} | VARIANTS[variant](name)
    config = peft.LoraConfig(lora_alpha=8, use_dora=True, task_type=TASKS[name], **fields)
    ours = we_read_peft(name, config, tmp_path / "theirs")
    assert type(methods(ours)["default"]) is peftctl.METHODS["dora"]
    if variant == "plain" and name != "bert":  # PEFT names heads of classifiers that are not there
        written_back(ours, tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_peft(name, tmp_path):
    ours = peftctl.attach(build(name), peftctl.METHODS["dora"](r=4, target_modules=TARGETS[name]))
    stir(ours)
    save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        model(**inputs(model)).logits.square().sum().backward()
    right = {key.replace(".default", "").removesuffix(".weight"): p.grad for key, p in theirs.named_parameters()}
    for site, adapter in adapters_of(ours, "default").items():
        for leaf, parameter in adapter.named_parameters():
            found = right[f"{PREFIX}{site}.{leaf}".removesuffix(".weight")]
            torch.testing.assert_close(parameter.grad, found, rtol=1e-3, atol=1e-4)


def test_a_folder_without_magnitudes_is_refused(tmp_path):
    save(peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=4)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(AdapterError, match=r"q_proj.lora_magnitude_vector` is missing"):
        peftctl.load(build("llama"), tmp_path)
