"""Bottlenecks against their equation put there by hooks, their places by hand, published counts, folders and errors."""

from __future__ import annotations

import json
from collections.abc import Callable

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, build, inputs, logits, stir
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM

import peftctl
from peftctl.engine.attach import adapters_of, live, methods, trained
from peftctl.errors import AdapterError

BOTTLENECK = peftctl.METHODS["bottleneck"]

ATTENTION = {
    "llama": [f"model.layers.{i}.self_attn.o_proj" for i in range(2)],
    "gpt2": [f"transformer.h.{i}.attn.c_proj" for i in range(2)],
    "t5": [
        *(f"{stack}.block.{i}.layer.0.SelfAttention.o" for stack in ("encoder", "decoder") for i in range(2)),
        *(f"decoder.block.{i}.layer.1.EncDecAttention.o" for i in range(2)),
    ],
    "bert": [f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)],
    "mixtral": [f"model.layers.{i}.self_attn.o_proj" for i in range(2)],
    "vit": [f"vit.layers.{i}.attention.o_proj" for i in range(2)],
}
FEED_FORWARD = {
    "llama": [f"model.layers.{i}.mlp.down_proj" for i in range(2)],
    "gpt2": [f"transformer.h.{i}.mlp.c_proj" for i in range(2)],
    "t5": [
        *(f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)),
        *(f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)),
    ],
    "bert": [f"bert.encoder.layer.{i}.output.dense" for i in range(2)],
    "mixtral": [f"model.layers.{i}.mlp" for i in range(2)],
    "vit": [f"vit.layers.{i}.mlp.fc2" for i in range(2)],
}
WHOLE = {shape: [name.rpartition(".")[0] for name in names] for shape, names in FEED_FORWARD.items()}
WHOLE["mixtral"] = FEED_FORWARD["mixtral"]
CASES = [
    *(("pfeiffer", shape) for shape in FEED_FORWARD),
    *(("houlsby", shape) for shape in FEED_FORWARD),
    *(("parallel", shape) for shape in FEED_FORWARD if shape != "bert"),
]


def places(variant: str, shape: str) -> set[str]:
    if variant == "parallel":
        return set(WHOLE[shape])
    return {*FEED_FORWARD[shape], *(ATTENTION[shape] if variant == "houlsby" else [])}


def hooked(shape: str, variant: str, values: dict[str, Tensor], act: Callable[[Tensor], Tensor], scale: float):
    """The plain model with the paper's equation in forward hooks; `values` by live name, as parameters."""
    model = build(shape)
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    for site in places(variant, shape):
        D, d, U, u = (
            parameters[f"{site}.adapters.default.bottleneck.{leaf}"]
            for leaf in ("down.weight", "down.bias", "up.weight", "up.bias")
        )

        def around(module, args, y, D=D, d=d, U=U, u=u):
            x = args[0] if variant == "parallel" else y
            return y + scale * (act(x @ D.T + d) @ U.T + u)

        model.get_submodule(site).register_forward_hook(around)
    return model, parameters


@pytest.mark.parametrize(("variant", "shape"), CASES)
def test_the_equation_at_the_places_of_the_variant(variant, shape):
    method = BOTTLENECK(variant=variant, reduction_factor=4, non_linearity="tanh", scale=1.5)
    model = peftctl.attach(build(shape), method)
    stir(model)
    assert set(adapters_of(model, "default")) == places(variant, shape)
    reference, parameters = hooked(shape, variant, trained(model), torch.tanh, 1.5)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), logits(build(shape)), atol=1e-3)
    for one in (model, reference):
        one(**inputs(one)).logits.square().sum().backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(("relu", nn.ReLU()), ("gelu", nn.GELU()), ("silu", nn.SiLU()), ("tanh", nn.Tanh())),
        *(("sigmoid", nn.Sigmoid()), ("leaky_relu", nn.LeakyReLU()), ("elu", nn.ELU()), ("mish", nn.Mish())),
    ],
)
def test_every_non_linearity(name, module):
    model = peftctl.attach(build("llama"), BOTTLENECK(reduction_factor=4, non_linearity=name))
    stir(model)
    reference, _ = hooked("llama", "pfeiffer", trained(model), module, 1.0)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("variant", "parameters"), [("pfeiffer", 894_528), ("houlsby", 1_789_056)])
def test_how_many_parameters_are_trained_of_bert_base(variant, parameters):
    """As AdapterHub counts them at a reduction factor of 16."""
    with torch.device("meta"):
        skeleton = BertForSequenceClassification(BertConfig())
    model = peftctl.attach(skeleton, BOTTLENECK(variant=variant))
    assert sum(p.numel() for p in trained(model).values()) == parameters


def test_a_start_near_the_base():
    model = peftctl.attach(build("llama"), BOTTLENECK(init_weights="normal", reduction_factor=2))
    base = logits(build("llama"))
    assert not torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-3)
    weights = torch.cat([p.detach().flatten() for name, p in trained(model).items() if name.endswith("weight")])
    assert 0.008 < float(weights.std()) < 0.01
    assert float(weights.abs().max()) <= 0.02


def test_a_waist_has_at_least_one_unit():
    model = peftctl.attach(build("llama"), BOTTLENECK(reduction_factor=1000))
    assert {a.bottleneck.down.out_features for a in adapters_of(model, "default").values()} == {1}


def test_dropout_is_for_training_alone():
    model = peftctl.attach(build("llama"), BOTTLENECK(reduction_factor=2, dropout=0.5))
    stir(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_layers_and_targets_of_the_recipe():
    def sites(**fields) -> set[str]:
        return set(adapters_of(peftctl.attach(build("llama"), BOTTLENECK(**fields)), "default"))

    assert sites(layers_to_transform=[1]) == {"model.layers.1.mlp.down_proj"}
    assert sites(variant="houlsby", exclude_modules=["down_proj"]) == set(ATTENTION["llama"])
    assert sites(target_modules=["self_attn.o_proj"]) == set(ATTENTION["llama"])
    assert sites(target_modules=["post_attention_layernorm"]) == {
        f"model.layers.{i}.post_attention_layernorm" for i in range(2)
    }


@pytest.mark.parametrize("shape", ["bert", "opt"])
def test_parallel_needs_a_feed_forward_that_is_a_module(shape):
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = (
        build("bert")
        if shape == "bert"
        else OPTForCausalLM(OPTConfig(vocab_size=VOCAB, word_embed_proj_dim=32, max_position_embeddings=64, **sizes))
    )
    with pytest.raises(AdapterError, match=r"method\.variant: `parallel`: .* no module that is a feed-forward"):
        peftctl.attach(model, BOTTLENECK(variant="parallel"))
    peftctl.attach(model, BOTTLENECK(variant="houlsby"))  # and stands where there are linears


def test_a_model_of_no_known_anatomy():
    with pytest.raises(AdapterError, match="Sequential has no feed-forward that peftctl knows by its name"):
        peftctl.attach(nn.Sequential(nn.Linear(4, 4)), BOTTLENECK())


def test_what_training_changes_is_all_that_a_checkpoint_holds():
    model = peftctl.attach(build("llama"), BOTTLENECK(variant="houlsby", reduction_factor=4))
    stir(model)
    torch.manual_seed(5)  # another start
    again = peftctl.attach(build("llama"), BOTTLENECK(variant="houlsby", reduction_factor=4))
    with torch.no_grad():
        for name, tensor in live(again).items():
            tensor.copy_(live(model)[name])
    assert torch.equal(logits(again), logits(model))


def test_the_folder_says_what_it_is(tmp_path):
    fields = {"variant": "parallel", "reduction_factor": 4, "non_linearity": "gelu", "scale": 4.0, "dropout": 0.1}
    peftctl.save(peftctl.attach(build("llama"), BOTTLENECK(**fields)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK"
    assert config["target_modules"] == WHOLE["llama"]
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{site}.bottleneck.{leaf}"
        for site in WHOLE["llama"]
        for leaf in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    read = methods(peftctl.load(build("llama"), tmp_path))["default"]
    assert {name: getattr(read, name) for name in fields} == fields


def test_peft_says_that_it_does_not_know_it(tmp_path):
    peftctl.save(peftctl.attach(build("llama"), BOTTLENECK()), tmp_path)
    with pytest.raises((KeyError, ValueError), match="BOTTLENECK"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)


def damaged(folder, **keys) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"variant": "sideways"}, "variant: expected one of pfeiffer, houlsby, parallel; got `sideways`"),
        ({"non_linearity": "dropout"}, "non_linearity: expected one of relu"),
        ({"reduction_factor": 8}, r"has shape \[8, 32\], the model wants \[4, 32\]"),
        ({"reduction_factor": 0}, "reduction_factor: expected a whole number of at least 1"),
        ({"layer_norm": True}, "layer_norm: `True` is not supported"),
    ],
)
def test_a_config_that_is_wrong(keys, words, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), BOTTLENECK(reduction_factor=4)), tmp_path)
    damaged(tmp_path, **keys)
    model = build("llama")
    with pytest.raises(AdapterError, match=words):
        peftctl.load(model, tmp_path)
    assert not adapters_of(model)


def test_a_tensor_file_without_bottlenecks(tmp_path):
    peftctl.save(peftctl.attach(build("llama"), BOTTLENECK()), tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="the tensor file beside it holds no bottleneck"):
        peftctl.load(build("llama"), tmp_path)
