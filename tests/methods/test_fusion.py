"""AdapterFusion against its equation token by token, what stays frozen, folders of its own, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import build, inputs, llama, logits, stir
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl import recipe as recipes
from peftctl.config.document import parse
from peftctl.engine.attach import adapters_of, live, trained
from peftctl.errors import AdapterError, RecipeError

BOTTLENECK, FUSION = peftctl.METHODS["bottleneck"], peftctl.METHODS["fusion"]


def bottleneck(folder: Path, seed: int = 0, shape: str = "llama", **fields) -> str:
    """The folder of a bottleneck adapter with random values."""
    model = peftctl.attach(build(shape), BOTTLENECK(**{"reduction_factor": 4, **fields}))
    stir(model, seed)
    peftctl.save(model, folder)
    return str(folder)


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Folders of two bottlenecks of different widths and activations."""
    return [
        bottleneck(tmp_path / "a", 1, variant="houlsby"),
        bottleneck(tmp_path / "b", 2, variant="houlsby", reduction_factor=2, non_linearity="tanh", scale=2.0),
    ]


def slow(h: torch.Tensor, x: torch.Tensor, parts: list[dict], Q, K, V) -> torch.Tensor:
    """Eq. 3 for one token, h and x [d], in float64."""
    z = []
    for part in parts:
        low = part["act"](part["down.weight"].double() @ x + part["down.bias"].double())
        z.append(part["scale"] * (part["up.weight"].double() @ low + part["up.bias"].double()))
    scores = torch.stack([(Q.double() @ h) @ (K.double() @ one) for one in z])
    counts = scores.exp() / scores.exp().sum()
    return h + sum(share * (V.double() @ one) for share, one in zip(counts, z, strict=True))


def read(folder: str, site: str) -> dict:
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    start = f"base_model.model.{site}.bottleneck."
    found = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    return {**found, "scale": config["scale"], "act": getattr(torch, config["non_linearity"])}


@pytest.mark.parametrize("parallel", [False, True])
def test_the_equation_token_by_token(two, parallel, tmp_path):
    if parallel:
        two = [bottleneck(tmp_path / f"p{i}", i, variant="parallel", scale=1.0 + i) for i in range(3)]
    model = peftctl.attach(build("llama"), FUSION(adapters=two))
    stir(model)
    sites = adapters_of(model, "default")
    assert len(sites) == (2 if parallel else 4)
    for site, adapter in sites.items():
        host = model.get_submodule(site)
        x = torch.randn(2, 3, 48 if site.endswith("down_proj") else 32)
        with torch.no_grad():
            y, h = host(x), build("llama").get_submodule(site)(x).double()
        Q, K, V = (getattr(adapter, name).weight.detach() for name in ("query", "key", "value"))
        parts = [read(folder, site) for folder in two]
        for row in range(2):
            for token in range(3):
                given = x[row, token].double() if parallel else h[row, token]
                expected = slow(h[row, token], given, parts, Q, K, V).float()
                torch.testing.assert_close(y[row, token], expected, rtol=1e-4, atol=1e-5)


def test_with_one_bottleneck_it_starts_from_that_one(two):
    alone = logits(peftctl.load(build("llama"), two[0]))
    model = peftctl.attach(build("llama"), FUSION(adapters=two[:1]))
    torch.testing.assert_close(logits(model), alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone, logits(build("llama")), atol=1e-3)


def test_query_key_and_value_are_trained_and_the_bottlenecks_are_not(two):
    model = peftctl.attach(build("llama"), FUSION(adapters=two))
    assert {name.rpartition("adapters.default.")[2] for name in trained(model)} == {
        "query.weight",
        "key.weight",
        "value.weight",
    }
    assert sum(p.numel() for p in trained(model).values()) == 4 * 3 * 32 * 32
    update = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    model.train()
    model(**inputs(model)).logits.square().mean().backward()
    update.step()
    for site, adapter in adapters_of(model, "default").items():
        for index, folder in enumerate(two):
            part, bottleneck = read(folder, site), adapter.bottlenecks[index]
            assert all(torch.equal(part[name], tensor) for name, tensor in bottleneck.state_dict().items())
            assert all(p.grad is None for p in bottleneck.parameters())


def test_the_dropout_that_a_bottleneck_was_trained_with_is_not_repeated(tmp_path):
    folder = bottleneck(tmp_path / "a", dropout=0.5)
    model = peftctl.attach(build("llama"), FUSION(adapters=[folder])).train()
    assert torch.equal(logits(model), logits(model))


def test_value_matrices_are_held_near_the_identity(two):
    method = FUSION(adapters=two, regularization=0.5)
    model = peftctl.attach(build("llama"), method)
    assert method.penalty(model).item() == 0.0
    values = [adapter.value.weight for adapter in adapters_of(model, "default").values()]
    with torch.no_grad():
        values[0][0, 0] += 3.0
        values[1][4, 5] -= 2.0
    penalty = method.penalty(model)
    assert penalty.item() == pytest.approx(0.5 * (9 + 4))
    penalty.backward()
    assert values[0].grad[0, 0] == pytest.approx(0.5 * 2 * 3)
    assert values[1].grad[4, 5] == pytest.approx(0.5 * 2 * -2)
    assert not values[2].grad.any()


def test_its_folder_needs_no_other(two, tmp_path):
    model = peftctl.attach(build("llama"), FUSION(adapters=two))
    stir(model)
    expected = logits(model)
    for folder in two:
        shutil.rmtree(folder)
    peftctl.save(model, tmp_path / "fusion")  # also after the folders of its parts are gone
    loaded = peftctl.load(build("llama"), tmp_path / "fusion")
    assert torch.equal(logits(loaded), expected)
    peftctl.save(loaded, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fusion" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    config = json.loads((tmp_path / "fusion" / "adapter_config.json").read_text())
    assert [part["reduction_factor"] for part in config["adapters"]] == [4, 2]
    assert str(tmp_path) not in (tmp_path / "fusion" / "adapter_config.json").read_text()


def test_places_of_the_recipe(two, tmp_path):
    method = FUSION(adapters=two, target_modules=["o_proj"], layers_to_transform=[0])
    model = peftctl.attach(build("llama"), method)
    stir(model)
    assert set(adapters_of(model, "default")) == {"model.layers.0.self_attn.o_proj"}
    peftctl.save(model, tmp_path / "fusion")
    assert torch.equal(logits(peftctl.load(build("llama"), tmp_path / "fusion")), logits(model))
    with pytest.raises(AdapterError, match=r"no bottleneck stands at `model\.layers\.0\.self_attn\.q_proj`"):
        peftctl.attach(build("llama"), FUSION(adapters=two, target_modules=["q_proj"]))


def test_what_training_changes_is_all_that_a_checkpoint_holds(two):
    model = peftctl.attach(build("llama"), FUSION(adapters=two))
    stir(model)
    again = peftctl.attach(build("llama"), FUSION(adapters=two))
    with torch.no_grad():
        for name, tensor in live(again).items():
            tensor.copy_(live(model)[name])
    assert torch.equal(logits(again), logits(model))


def test_peft_says_that_it_does_not_know_it(two, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), FUSION(adapters=two)), tmp_path / "fusion")
    with pytest.raises((KeyError, ValueError), match="FUSION"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path / "fusion")


def refused(words: str, *folders: str, model=None, **fields) -> None:
    model = llama() if model is None else model
    with pytest.raises(AdapterError, match=words):
        peftctl.attach(model, FUSION(adapters=list(folders), **fields))
    assert not adapters_of(model)


def test_folders_that_cannot_be_combined(two, tmp_path):
    lora = peftctl.save(peftctl.attach(build("llama"), peftctl.METHODS["lora"]()), tmp_path / "lora")
    refused("combines adapters of the method `bottleneck`; this is a `LORA`", two[0], str(lora))
    refused("no such adapter folder", two[0], str(tmp_path / "nowhere"))
    elsewhere = bottleneck(tmp_path / "pfeiffer")
    refused(f"{elsewhere}: its bottlenecks do not stand where those of `{two[0]}` do", two[0], elsewhere)
    beside = bottleneck(tmp_path / "beside", variant="parallel", target_modules=["o_proj", "down_proj"])
    refused("do not stand where", two[0], beside)


def test_bottlenecks_of_another_base(two):
    sizes = {"vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    wider = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, **sizes))
    refused(r"has shape \[8, 32\], the model wants \[16, 64\]", two[0], model=wider)
    deeper = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, **sizes))
    refused("is not part of this adapter", two[0], model=deeper)
    refused("is not part of this adapter", two[0], model=build("gpt2"))


def test_a_head_that_was_trained_beside_a_bottleneck_is_trained_anew(tmp_path):
    folder = bottleneck(tmp_path / "a", shape="bert", modules_to_save=["classifier"])
    refused("trained `classifier` whole beside its bottlenecks", folder, model=build("bert"))
    model = peftctl.attach(build("bert"), FUSION(adapters=[folder], modules_to_save=["classifier"]))
    assert torch.equal(adapters_of(model, "default")["classifier"].copy.weight, build("bert").classifier.weight)
    stir(model)
    peftctl.save(model, tmp_path / "fusion")
    assert torch.equal(logits(peftctl.load(build("bert"), tmp_path / "fusion")), logits(model))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"adapters": []}, "adapters: expected a list of what each of the bottlenecks is"),
        ({"adapters": "a"}, "adapters: expected a list of what each of the bottlenecks is"),
        ({"adapters": [{}, {}, {}]}, r"adapters\[2\]: peft_type: the tensor file beside it holds no bottleneck"),
        ({"adapters": [{"variant": "up"}, {}]}, r"adapters\[0\]: variant: expected one of"),
        ({"adapters": [{"reduction_factor": 4}]}, r"bottlenecks\.1\.down\.bias` is not part of this adapter"),
        ({"temperature": 2}, "temperature: `2` is not supported"),
    ],
)
def test_a_config_that_is_wrong(keys, words, two, tmp_path):
    folder = peftctl.save(peftctl.attach(build("llama"), FUSION(adapters=two)), tmp_path / "fusion")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))
    with pytest.raises(AdapterError, match=words):
        peftctl.load(build("llama"), folder)


def recipe(adapters: list[str]) -> str:
    lines = ["model: {name_or_path: org/base}", "method:", "  type: fusion", f"  adapters: {json.dumps(adapters)}"]
    return "\n".join([*lines, "dataset: {train: rows.jsonl}", "output: runs/x"])


def test_folders_are_seen_from_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    (tmp_path / "recipes" / "b").mkdir()
    file = tmp_path / "recipes" / "fusion.yaml"
    file.write_text(recipe(["../elsewhere/a", "b", "org/hub-id"]))
    monkeypatch.chdir(tmp_path)
    read = recipes.read(file)
    assert read.method.adapters == ["elsewhere/a", "recipes/b", "org/hub-id"]
    written = recipes.dump(read)
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = recipes.build(parse(written, "again"), Path("."))
    assert again.method.adapters == ["a", str(tmp_path / "recipes" / "b"), "org/hub-id"]
    changed = recipes.read(file, ["method.adapters=[a]"])  # on the command line: from here
    assert changed.method.adapters == ["a"]


def test_a_recipe_without_folders():
    with pytest.raises(RecipeError, match=r"method\.adapters"):
        recipes.build(parse(recipe([]), "recipe"), Path("."))
