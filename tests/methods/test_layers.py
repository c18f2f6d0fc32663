"""Parts trained whole: which, that they run as the original would, also recomputed and with a cache."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, greedy, inputs, logits, stir
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError
from peftctl.models.recomputing import recompute

LAYERS = peftctl.METHODS["layers"]
BLOCK = {
    "llama": "model.layers.1",
    "gpt2": "transformer.h.1",
    "t5": "decoder.block.1",  # which reads the encoder too, and so is the larger stack
    "bert": "bert.encoder.layer.1",
    "mixtral": "model.layers.1",
    "vit": "vit.layers.1",
}
NORMS = {"llama": 5, "gpt2": 5, "t5": 2 * 2 + 2 * 3 + 2, "bert": 5, "mixtral": 5, "vit": 5}
HEAD = {"bert": "classifier", "vit": "classifier"}


def sites(name: str, **fields) -> list[str]:
    return list(adapters_of(peftctl.attach(build(name), LAYERS(**fields)), "default"))


@pytest.mark.parametrize("name", BLOCK)
def test_parts_are_found_in_every_architecture(name):
    assert sites(name, top=1) == [BLOCK[name]]
    assert len(sites(name)) == 2
    assert len(sites(name, norms=True)) == NORMS[name]
    assert sites(name, heads=True) == [HEAD.get(name, "lm_head")]


def test_the_outermost_of_overlapping_choices_is_trained():
    found = sites("llama", top=1, norms=True, modules=["model.layers.0.mlp", "down_proj", "model.layers.1"])
    assert found == [
        "model.layers.0.mlp",
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1",
        "model.norm",
    ]
    assert sites("llama", top=0, modules=r"model\.layers\.0(\..*)?") == ["model.layers.0"]


def test_how_many_parameters_the_last_blocks_of_a_published_model_have():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        found = LAYERS().build(model, LAYERS().sites(model))  # as when a folder is compared with a model: free
    counted = sum(p.numel() for adapter in found for p in adapter.parameters())
    assert counted == 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) == 404_766_720
    assert all(p.is_meta for adapter in found for p in adapter.parameters())


def test_nothing_is_copied_to_find_out_whether_a_folder_fits():
    model = build("llama")
    method = LAYERS(top=2, heads=True)
    with torch.device("meta"):
        found = method.build(model, method.sites(model))
    assert all(p.is_meta for adapter in found for p in adapter.parameters())
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", BLOCK)
def test_gradients_are_those_of_the_parts_themselves(name):
    model, plain = peftctl.attach(build(name), LAYERS(top=1, heads=True)), build(name)
    for network in (model, plain):
        network(**inputs(network)).logits.square().mean().backward()
    for key, parameter in trained(model).items():
        own = plain.get_parameter(key.replace(".adapters.default.copy", ""))
        if key.startswith("lm_head") and plain.config.tie_word_embeddings:
            continue  # the base's also has those of the embedding, which is not trained here
        torch.testing.assert_close(parameter.grad, own.grad)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_generation_with_a_cache_is_generation_without(name):
    model = peftctl.attach(build(name), LAYERS(top=2, norms=True))
    stir(model)
    given = {key: value for key, value in inputs(model).items() if not key.startswith("decoder")}
    slow = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False).tolist()
    assert greedy(model) == slow
    assert slow != greedy(build(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{"top": 2}, {"modules": "encoder|decoder|transformer|model"}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_recomputed_in_the_backward_pass(name, fields, dtype):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = peftctl.attach(build(name).to(dtype), LAYERS(**fields)).train()
        stir(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            recompute(model)
        model(**inputs(model)).logits.float().square().mean().backward()
        return {key: p.grad for key, p in trained(model).items()}

    plain, again = gradients(False), gradients(True)
    assert plain
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient)


def test_recomputing_saves_the_memory_of_the_copy():
    def saved(checkpointing: bool) -> int:
        model = peftctl.attach(build("llama"), LAYERS()).train()
        if checkpointing:
            recompute(model)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            model(**inputs(model))
        return sum(sizes)

    assert saved(True) < 0.3 * saved(False)


def test_folder_and_merge_are_exact(tmp_path):
    model = peftctl.attach(build("llama"), LAYERS(top=1, heads=True, modules=["model.norm"]))
    stir(model)
    peftctl.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["modules"]) == ("LAYERS", ["lm_head", "model.layers.1", "model.norm"])
    plain = build("llama").state_dict()
    parts = ("model.layers.1.", "model.norm.", "lm_head.")
    assert {key.removeprefix("base_model.model.") for key in tensors} == {key for key in plain if key.startswith(parts)}
    again = peftctl.load(build("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    merged = peftctl.merge(again).state_dict()
    for key, value in merged.items():
        assert torch.equal(value, tensors.get(f"base_model.model.{key}", plain[key]))


@pytest.mark.parametrize("change", ["a name more", "a name less", "none"])
def test_a_folder_that_contradicts_itself_is_refused(change, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), LAYERS(top=1)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = {"a name more": ["model.layers.1", "model.norm"], "a name less": ["model.layers.1.mlp"], "none": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules": names[change]}))
    words = {"a name more": "has no tensor", "a name less": "is not part of this adapter", "none": "names no module"}
    with pytest.raises(AdapterError, match=words[change]):
        peftctl.load(build("llama"), tmp_path)


def test_the_copy_of_a_part_takes_no_adapter_of_others_along():
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=2), "lora")
    peftctl.attach(model, LAYERS(top=1))
    assert not any("lora" in key for key in trained(model))
    assert torch.equal(logits(model), logits(build("llama")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top": 3}, "method.top: 3 blocks, and `model.layers` has 2"),
        ({"top": 0}, "nothing is chosen"),
        ({"modules": ["model.layer"]}, "method.modules: `model.layer` matches no module"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(AdapterError, match=message):
        peftctl.attach(build("llama"), LAYERS(**fields))


@pytest.mark.parametrize(
    ("fields", "place"), [({"top": 1}, "top"), ({"heads": True}, "heads"), ({"norms": True}, "norms")]
)
def test_a_model_without_such_parts(fields, place):
    with pytest.raises(AdapterError, match=f"method.{place}: ModuleDict has no"):
        peftctl.attach(nn.ModuleDict({"first": nn.Linear(2, 2)}), LAYERS(**fields))


def test_what_is_stored_in_four_bits_is_refused():
    class Linear4bit(nn.Linear):
        pass

    model = build("llama")
    model.model.layers[1].mlp.up_proj.__class__ = Linear4bit
    with pytest.raises(AdapterError, match=r"method: `model.layers.1`: .* stored in 4 or 8 bits cannot be trained"):
        peftctl.attach(model, LAYERS(top=1))
    assert set(adapters_of(peftctl.attach(model, LAYERS(norms=True)), "default"))
