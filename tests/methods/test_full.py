"""Full fine-tuning: it is plain training of the model, and refuses what needs the base as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, inputs, llama, logits, stir
from torch import nn

import peftctl
from peftctl.engine.attach import trained
from peftctl.engine.per_row import rows
from peftctl.errors import AdapterError

FULL, LORA = peftctl.METHODS["full"], peftctl.METHODS["lora"]


def tied() -> nn.Module:
    torch.manual_seed(0)
    return llama(tied=True).eval()


def step(model: nn.Module, parameters) -> None:
    update = torch.optim.AdamW(parameters, lr=1e-2)
    model(**inputs(model)).logits.float().square().mean().backward()
    update.step()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "mixtral", "vit"])
def test_it_is_plain_training_of_every_parameter(name):
    model, plain = peftctl.attach(build(name), FULL()), build(name)
    assert trained(model).keys() == dict(plain.named_parameters()).keys()
    step(model, trained(model).values())
    step(plain, plain.parameters())
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert not torch.equal(logits(model), logits(build(name)))


def test_a_16_bit_base_is_trained_in_float32():
    model, plain = peftctl.attach(build("llama").bfloat16(), FULL()), build("llama").bfloat16().float()
    step(model, trained(model).values())
    step(plain, plain.parameters())
    assert torch.equal(logits(model), logits(plain))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_or_in_the_dtype_that_it_came_in():
    model = peftctl.attach(build("llama").bfloat16(), FULL(dtype="base"))
    step(model, trained(model).values())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(logits(model), logits(build("llama").bfloat16()))


@pytest.mark.parametrize("make", [tied, lambda: build("llama")])
def test_the_folder_holds_every_parameter_once(make, tmp_path):
    model = peftctl.attach(make(), FULL())
    stir(model)
    peftctl.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in tensors} == dict(make().named_parameters()).keys()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FULL"
    again = peftctl.load(make(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    ends = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert ends == bool(make().config.tie_word_embeddings)


def test_loaded_into_a_16_bit_base_it_runs_in_16_bits(tmp_path):
    model = peftctl.attach(build("llama"), FULL())
    stir(model)
    peftctl.save(model, tmp_path)
    again = peftctl.load(build("llama").bfloat16(), tmp_path)
    assert torch.equal(logits(again), logits(model.bfloat16()))


def test_merging_leaves_a_plain_model_with_its_tie():
    model = peftctl.attach(tied(), FULL())
    stir(model)
    expected = logits(model)
    merged = peftctl.merge(model)
    assert torch.equal(logits(merged), expected)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert not any("adapters" in key for key, _ in merged.named_modules())
    peftctl.attach(merged, LORA(r=2))  # a base again


def bare(model: nn.Module) -> None:
    with peftctl.bare(model):
        pass


def by_row(model: nn.Module) -> None:
    with rows(model, [None, None]):
        pass


NEEDS_THE_BASE = {
    "bare": bare,
    "detach": lambda model: peftctl.detach(model, "whole"),
    "switch off": lambda model: peftctl.activate(model, []),
    "another adapter": lambda model: peftctl.attach(model, LORA(r=2)),
    "itself again": lambda model: peftctl.attach(model, FULL()),
    "rows of the base": by_row,
}


@pytest.mark.parametrize("what", NEEDS_THE_BASE)
def test_what_needs_the_base_is_refused(what):
    model = peftctl.attach(build("llama"), FULL(), "whole")
    stir(model)
    before = logits(model)
    with pytest.raises(
        AdapterError, match="`whole` has trained the base itself, which is no longer as it was"
    ) as caught:
        NEEDS_THE_BASE[what](model)
    assert "layers" in str(caught.value.problems[0].hint)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(peftctl.activate(model, ["whole"])), before)


def test_it_does_not_go_under_adapters_that_are_there():
    model = peftctl.attach(build("llama"), LORA(r=2), "small")
    stir(model)
    before = logits(model)
    with pytest.raises(AdapterError, match="it would train the base under `small`"):
        peftctl.attach(model, FULL(), "whole")
    assert torch.equal(logits(model), before)


def test_what_is_stored_in_four_bits_is_refused():
    class Linear4bit(nn.Linear):
        pass

    model = build("llama")
    model.lm_head.__class__ = Linear4bit
    with pytest.raises(AdapterError, match="1 modules, such as `lm_head`, are stored in 4 or 8 bits"):
        peftctl.attach(model, FULL())


@pytest.mark.parametrize("damage", ["missing", "more"])
def test_a_folder_of_another_model_is_refused_and_nothing_is_written(damage, tmp_path):
    from safetensors.torch import save_file

    peftctl.save(peftctl.attach(build("llama"), FULL()), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if damage == "missing":
        del tensors["base_model.model.model.norm.weight"]
    else:
        tensors["base_model.model.model.other.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = build("llama", seed=1)
    with pytest.raises(AdapterError, match=r"is missing|is not part of this adapter"):
        peftctl.load(model, tmp_path)
    assert torch.equal(logits(model), logits(build("llama", seed=1)))
