"""Which modules a recipe's names mean: HF PEFT's rules, without its silences."""

from __future__ import annotations

import peft
import pytest
from tiny import build

import peftctl
from peftctl.engine.anatomy import find
from peftctl.engine.attach import adapters_of
from peftctl.errors import AdapterError

PATTERNS = [
    ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"}),
    ("llama", {"target_modules": ["mlp.up_proj", "embed_tokens"]}),
    ("gpt2", {"target_modules": ["attn.c_proj"]}),
    ("t5", {"target_modules": ["encoder.block.0.layer.0.SelfAttention.q", "wo"]}),
    *((name, {"target_modules": "all-linear"}) for name in ("llama", "gpt2", "t5")),
]


@pytest.mark.parametrize(("name", "options"), PATTERNS)
def test_matches_what_peft_matches(name, options):
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(r=2, **options))
    wanted = {key.removeprefix("base_model.model.") for key, m in theirs.named_modules() if hasattr(m, "lora_A")}
    ours = peftctl.attach(build(name), peftctl.METHODS["lora"](r=2, **options))
    assert set(adapters_of(ours, "default")) == wanted


def test_attention_and_mlp_share_the_linears_of_a_block():
    for name in ("llama", "gpt2", "t5", "bert"):
        model = build(name)
        attention, mlp = ({site.name for site in find(model, word)} for word in ("attention", "mlp"))
        everything = {site.name for site in find(model, "all-linear")}
        assert not attention & mlp
        assert {leaf for leaf in everything - attention - mlp if "pooler" not in leaf} == set()


def test_every_unmatched_entry_is_told_with_near_names():
    with pytest.raises(AdapterError) as caught:
        peftctl.attach(build("llama"), peftctl.METHODS["lora"](target_modules=["q_proj", "vproj", "nonsense"]))
    first, second = caught.value.problems
    assert first.text == "method.target_modules: `vproj` matches no module of LlamaForCausalLM"
    assert first.hint == "did you mean `v_proj`?"
    assert "`gate_proj`" in second.hint


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": ["norm"]}, "`model.norm` is a LlamaRMSNorm, no linear or embedding"),
        ({"target_modules": "(q_proj"}, "is no regular expression"),
        ({"target_modules": "nothing.*"}, "`nothing.*` matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no module of LlamaForCausalLM is left"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "no module of LlamaForCausalLM is left"),
        ({"modules_to_save": ["lm_hed"]}, "method.modules_to_save: `lm_hed` matches no module"),
    ],
)
def test_what_cannot_be_attached_leaves_the_model_alone(options, text):
    model = build("llama")
    with pytest.raises(AdapterError, match=None) as caught:
        peftctl.attach(model, peftctl.METHODS["lora"](**options))
    assert text in str(caught.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_fused_experts_are_named_as_the_reason():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    with pytest.raises(AdapterError) as caught:
        peftctl.attach(model, peftctl.METHODS["lora"](target_modules=["w1"]))
    assert "fused 3-D parameters" in caught.value.problems[0].hint
