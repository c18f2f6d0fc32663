"""QA-LoRA: its equation, its groups, and folders of the form that HF PEFT has for GPTQ hosts.

PEFT builds QA-LoRA on GPTQ layers alone and ignores `use_qalora` elsewhere. Here its own QA-LoRA code is put behind
its linears, so that it is the oracle on ordinary hosts too.
"""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from methods.oracle import TASKS, peft_reads_ours, we_read_peft, written_back
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from tiny import build, stir
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError

QALORA = peftctl.METHODS["qalora"]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "intermediate.dense"],
}
# PEFT's fields -> ours
NAMES = {"lora_alpha": "alpha", "qalora_group_size": "group_size", "lora_dropout": "dropout"}
VARIANTS = {
    "plain": {},
    "groups of 4": {"qalora_group_size": 4},
    "rslora": {"use_rslora": True},
    "own biases": {"bias": "lora_only"},
    "all linears": {"target_modules": "all-linear"},
}
CASES = [(name, variant) for name in TARGETS for variant in VARIANTS]
HEADS = {"bert": {"modules_to_save": ["classifier"]}}
"""What PEFT trains of every sequence classifier."""


def fields(name: str, variant: str) -> dict:
    return {"r": 4, "lora_alpha": 8, "qalora_group_size": 8, "target_modules": TARGETS[name]} | VARIANTS[variant]


@pytest.fixture
def everywhere(monkeypatch):
    """PEFT's QA-LoRA on its ordinary linears."""
    plain = Linear.resolve_lora_variant

    def variant(self, *, config, **kwargs):
        return QALoraLinearVariant() if config.use_qalora else plain(self, config=config, **kwargs)

    monkeypatch.setattr(Linear, "resolve_lora_variant", variant)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / math.sqrt(4))])
def test_the_equation(rslora, scale):
    method = QALORA(r=4, alpha=12, group_size=8, use_rslora=rslora, target_modules=["q_proj", "down_proj"])
    model = peftctl.attach(build("llama"), method)
    stir(model)
    for site, adapter in adapters_of(model, "default").items():
        host = model.get_submodule(site)
        inputs = host.in_features
        assert adapter.lora_A.weight.shape == (4, inputs // 8)
        x = torch.randn(3, inputs)
        means = torch.stack([x[:, group * 8 : (group + 1) * 8].mean(1) for group in range(inputs // 8)], 1)
        update = scale * (means * (inputs // 8)) @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
        torch.testing.assert_close(host(x), x @ host.weight.T + update, rtol=1e-4, atol=1e-4)


def test_the_update_has_one_value_for_all_inputs_of_a_group():
    """So that, as the paper has it, the zero points of weights quantised in such groups can take it up."""
    model = peftctl.attach(build("llama"), QALORA(r=4, group_size=8))
    stir(model)
    for adapter in adapters_of(model, "default").values():
        groups = adapter.matrix().unflatten(1, (-1, 8))
        assert torch.equal(groups, groups[..., :1].expand_as(groups))
        assert not torch.allclose(groups[:, 0], groups[:, 1])


def test_groups_make_it_smaller():
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig())
    model = peftctl.attach(skeleton, QALORA(r=8, group_size=32, target_modules=["q_proj", "v_proj"]))
    assert sum(p.numel() for p in trained(model).values()) == 32 * 2 * 8 * (4096 // 32 + 4096)


def test_inputs_that_are_no_multiple_of_the_group_are_named():
    with pytest.raises(AdapterError) as caught:
        peftctl.attach(build("llama"), QALORA(group_size=32))
    texts = [problem.text for problem in caught.value.problems]
    site = "model.layers.{}.mlp.down_proj"
    told = "method.group_size: the 48 inputs of `{}` are no multiple of 32"
    assert texts == [told.format(site.format(layer)) for layer in (0, 1)]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_pefts_code_reads_what_we_save(name, variant, tmp_path, everywhere):
    ours = {NAMES.get(key, key): value for key, value in fields(name, variant).items()}
    peft_reads_ours(name, "qalora", ours | HEADS.get(name, {}), tmp_path)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_we_read_what_pefts_code_saves(name, variant, tmp_path, everywhere):
    config = peft.LoraConfig(**fields(name, variant), use_qalora=True, lora_dropout=0.1, task_type=TASKS[name])
    ours = we_read_peft(name, config, tmp_path / "theirs")
    assert {type(adapter).__name__ for adapter in adapters_of(ours, "default").values()} >= {"QALoRALinear"}
    written_back(ours, tmp_path / "theirs", tmp_path / "ours", frozenset({"modules_to_save"}))


def test_peft_itself_refuses_it_on_ordinary_hosts(tmp_path):
    """It ignores `use_qalora` there, builds a LoRA, and finds that A has another shape."""
    peftctl.save(peftctl.attach(build("llama"), QALORA(r=4, group_size=8)), tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A.default.weight"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"qalora_group_size": 4}, r"lora_A.weight` has shape \[4, 4\], the model wants \[4, 8\]"),
        ({"qalora_group_size": 5}, r"adapter_config.json: group_size: the 32 inputs of .* are no multiple of 5"),
        ({"qalora_group_size": 0}, "qalora_group_size: expected a whole number of at least 1"),
        ({"use_qalora": False}, r"lora_A.weight` has shape \[4, 4\], the model wants \[4, 32\]"),
        ({"r": 8}, "has rank 4, the config says 8"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern: .* is not supported"),
        ({"lora_bias": True}, "lora_bias: `True` is not supported"),
    ],
)
def test_a_folder_that_contradicts_itself(changes, text, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), QALORA(r=4, group_size=8)), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    model = build("llama")
    with pytest.raises(AdapterError, match=text):
        peftctl.load(model, tmp_path)
    assert not adapters_of(model)


def test_a_lora_that_claims_to_be_one(tmp_path):
    peftctl.save(peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=4)), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_qalora": True}))
    with pytest.raises(AdapterError, match=r"lora_A.weight` has shape \[4, 32\], the model wants \[4, 2\]"):
        peftctl.load(build("llama"), tmp_path)


def test_what_does_not_merge_is_said():
    assert "zero points" in QALORA.merges
    model = peftctl.attach(build("gpt2"), QALORA(r=4, group_size=8))
    stir(model)
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    changed = peftctl.merge(model).transformer.h[0].attn.c_attn.weight - before
    groups = changed.T.unflatten(1, (-1, 8))
    torch.testing.assert_close(groups, groups[..., :1].expand_as(groups), rtol=0, atol=1e-6)
