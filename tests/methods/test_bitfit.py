"""BitFit: which biases, how many, and that the base keeps its own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, inputs, logits, stir
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError

BITFIT = peftctl.METHODS["bitfit"]


def test_bert_base_trains_about_a_thousandth():
    with torch.device("meta"):
        model = BertModel(BertConfig())  # its defaults are those of BERT-base
    total = model.num_parameters()
    counted = sum(p.numel() for p in trained(peftctl.attach(model, BITFIT())).values())
    block = 4 * 768 + 3072 + 768 + 2 * 768  # attention, feed-forward, layer norms
    assert counted == 12 * block + 768 + 768 == 102_912  # and the norm of the embeddings, the pooler
    assert counted / total == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_every_bias_of_the_model_is_trained_and_nothing_else(name):
    model, plain = peftctl.attach(build(name), BITFIT()), build(name)
    names = {key.replace(".adapters.default", "") for key in trained(model)}
    assert names == {key for key, _ in plain.named_parameters() if key.endswith("bias")}


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])  # ViT begins with a convolution
def test_it_computes_what_the_model_would_with_these_biases(name):
    model, plain = peftctl.attach(build(name), BITFIT()), build(name)
    stir(model)
    with torch.no_grad():
        for site, adapter in adapters_of(model, "default").items():
            plain.get_submodule(site).bias.copy_(adapter.bias)
    assert not torch.allclose(logits(plain), logits(build(name)), atol=1e-2)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(peftctl.merge(model)), logits(plain))


def test_gradients_are_those_of_the_biases_themselves():
    model, plain = peftctl.attach(build("bert"), BITFIT()), build("bert")
    for network in (model, plain):
        network(**inputs(network)).logits.square().sum().backward()
    for site, adapter in adapters_of(model, "default").items():
        torch.testing.assert_close(adapter.bias.grad, plain.get_submodule(site).bias.grad)


@pytest.mark.parametrize(
    ("fields", "endings"),
    [
        ({"target_modules": ["query", "intermediate.dense"]}, {"self.query", "intermediate.dense"}),  # the paper's two
        ({"target_modules": "attention"}, {"self.query", "self.key", "self.value", "attention.output.dense"}),
        ({"target_modules": r".*\.LayerNorm", "layers_to_transform": 1}, {"output.LayerNorm"}),
        ({"target_modules": "mlp", "exclude_modules": ["intermediate.dense"]}, {"output.dense"}),
    ],
)
def test_some_biases(fields, endings):
    found = set(adapters_of(peftctl.attach(build("bert"), BITFIT(**fields)), "default"))
    assert {end for end in endings if any(name.endswith(end) for name in found)} == endings
    assert all(name.endswith(tuple(endings)) for name in found)
    layers = {name.split(".")[3] for name in found}
    assert layers == ({"1"} if "layers_to_transform" in fields else {"0", "1"})


def test_the_head_is_trained_whole_beside_the_biases(tmp_path):
    model = peftctl.attach(build("bert"), BITFIT(modules_to_save=["classifier"]))
    stir(model)
    peftctl.save(model, tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= keys
    assert "base_model.model.bert.encoder.layer.0.output.LayerNorm.bias" in keys
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BITFIT"
    again = peftctl.load(build("bert"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert set(trained(again)) == set(trained(model))


def test_half_precision():
    model = peftctl.attach(build("gpt2").bfloat16(), BITFIT())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert torch.equal(logits(model), logits(build("gpt2").bfloat16()))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_without_biases_is_told_with_ways_out(name):
    with pytest.raises(AdapterError, match=f"{type(build(name)).__name__} has no bias to train") as caught:
        peftctl.attach(build(name), BITFIT())
    assert "ia3" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["querry"]}, "method.target_modules: `querry` matches no module"),
        ({"target_modules": ["bert.embeddings.word_embeddings"]}, "matches no module"),
        ({"target_modules": ["pooler.dense"], "exclude_modules": "all-linear"}, "no bias .* is left to train"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(AdapterError, match=message):
        peftctl.attach(build("bert"), BITFIT(**fields))


class Early(nn.Module):
    """A bias that acts before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return torch.relu(self.linear(x) + self.bias)


def test_a_bias_that_no_adapter_could_train_is_not_left_out_in_silence():
    model = nn.ModuleDict({"early": Early()})
    with pytest.raises(AdapterError, match="`early` is a Early, which may use its bias anywhere"):
        peftctl.attach(model, BITFIT())
    assert set(adapters_of(peftctl.attach(model, BITFIT(target_modules="all-linear")), "default")) == {"early.linear"}


def test_a_bias_that_two_modules_share_is_trained_once():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    model = peftctl.attach(BertForMaskedLM(config), BITFIT())  # its head and the module around it share one
    heads = [name for name in adapters_of(model, "default") if name.startswith("cls.predictions.decoder")]
    assert heads == ["cls.predictions.decoder"]
