"""Folders of base models from strangers: no code, no pickle, nothing allocated for what is not there."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.attack import CANARY, Attack


class Payload:
    """What runs a command where a pickle of it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


EVIL = pickle.dumps(Payload())


@pytest.fixture
def folder(attack: Attack) -> Path:
    """A copy of a good model, to be spoilt."""
    shutil.copytree(attack.base, attack.work / "base")
    attack.recipe(base="base")
    return attack.work / "base"


def configure(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CODE: dict[str, tuple[dict[str, Any], str]] = {
    # CVE-2026-4372 (transformers 4.56 to 5.2), CVE-2026-86169 (Axolotl), CVE-2026-5843
    "_attn_implementation_internal": ({"_attn_implementation_internal": "evil/kernel"}, "foreign code"),
    "_attn_implementation": ({"_attn_implementation": "evil/kernel@main:forward"}, "foreign code"),
    "attn_implementation": ({"attn_implementation": "canary_module/x"}, "foreign code"),
    "_experts_implementation": ({"_experts_implementation": "evil/experts"}, "foreign code"),
    "_experts_implementation_internal": ({"_experts_implementation_internal": "evil/experts"}, "foreign code"),
    "one inside": ({"text_config": {"_attn_implementation_internal": "evil/kernel"}}, "foreign code"),
    "one by part": ({"attn_implementation": {"text_config": "evil/kernel"}}, "foreign code"),
    "other weights": ({"transformers_weights": "../../outside/secret"}, "foreign code or files"),
    "a class of its own": ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "never run"),
    "an unknown type": ({"model_type": "canary_module"}, "unknown to transformers"),
    "a type that is no text": ({"model_type": ["llama"]}, "model_type"),
    "a quantiser": ({"quantization_config": {"quant_method": "canary_module"}}, "already quantised"),
    # sizes: refused before anything of them is built
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
    "layers of a type that lists them": (
        {"model_type": "qwen2", "num_hidden_layers": 10**9},
        "num_hidden_layers: 1000000000",
    ),
    "layers inside": (
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
        "num_hidden_layers: 1000000000",
    ),
    "words": ({"vocab_size": 10**12}, "vocab_size: 1000000000000"),
    "width": ({"hidden_size": 10**12}, "hidden_size: 1000000000000"),
    "inner width": ({"intermediate_size": 10**8}, "a model of 19,200,\\d+,\\d+ parameters"),
    "inner width beyond numbers": ({"intermediate_size": 10**400}, "intermediate_size: ...`: more than"),
    "heads": ({"num_attention_heads": 10**9}, "base"),
    "positions": ({"max_position_embeddings": 10**12, "model_type": "gpt2", "n_positions": 10**12}, "base"),
    "labels": ({"num_labels": 10**9}, "num_labels: 1000000000"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts: 1000000000"),
    "negative": ({"num_hidden_layers": -1, "hidden_size": -32}, "base"),
    "no number": ({"hidden_size": "32"}, "base"),
    "nothing": ({"hidden_size": None, "num_attention_heads": 0}, "base"),
    "a rope of its own": ({"rope_scaling": {"rope_type": "canary_module", "factor": 1e308}}, "base"),
    "an activation by name": ({"hidden_act": "os.system"}, "base"),
    "a dtype by name": ({"dtype": "load"}, "base"),
}


@pytest.mark.parametrize("name", CODE)
def test_a_configuration_is_refused(name: str, folder: Path, attack: Attack):
    changes, telling = CODE[name]
    configure(folder, **changes)
    attack.refused("generate", str(adapter(attack)), "hi", telling=telling, within=3.0)


def adapter(attack: Attack) -> Path:
    """A run to be asked, whose base is `base`: the way to a model's weights without training."""
    attack.write("run/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    return attack.work / "run"


@pytest.mark.slow
def test_code_that_lies_beside_is_never_run(folder: Path, attack: Attack):
    for name in ("evil", "modeling_evil", "tokenization_evil", "configuration_evil"):
        (folder / f"{name}.py").write_text(CANARY)
    configure(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"})
    configure(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.TFast"]},
    )
    configure(folder, custom_pipelines={"evil": {"impl": "evil.Pipeline"}}, custom_generate="evil")
    attack.recipe(base="base", trainer={"steps": 1, "fast": "off"})
    attack.harmless("train", "recipe.yaml", writes=["run"], within=20, swelling=600)
    attack.harmless("generate", "run", "hi", "--max-new-tokens", "1", within=20)
    attack.harmless("merge", "run", "--output", "merged", writes=["."], within=20, swelling=600)
    assert not list((attack.work / "merged").glob("*.py"))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(EVIL)


def pickle_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(EVIL)


def zip_by_another_name(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as file:
        file.writestr("archive/data.pkl", EVIL)


def seven_zip_by_another_name(folder: Path) -> None:  # nullifAI, February 2025
    (folder / "model.safetensors").write_bytes(b"7z\xbc\xaf\x27\x1c" + b"\0" * 26 + EVIL)


def index_of_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "evil.bin").write_bytes(EVIL)
    index = {"weight_map": {"lm_head.weight": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leaves(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../../outside/secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link_to_passwords(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def weights_without_end(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def configuration_without_end(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def configuration_of_100_megabytes(folder: Path) -> None:
    with (folder / "config.json").open("w") as file:
        file.truncate(100 << 20)


def configuration_of_brackets(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000)


def configuration_of_secrets(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent.parent / "outside" / "secret")


def tokenizer_of_100_megabytes(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+") as file:
        file.truncate(100 << 20)


def cutting(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        configure(folder, "tokenizer.json", pre_tokenizer=split)

    return spoil


def tokenizer_of_a_panic(folder: Path) -> None:
    configure(folder, "tokenizer.json", added_tokens=[{"id": 2**63, "content": "x"}], model={"type": "BPE"})


def tokens_beyond_the_model(folder: Path) -> None:
    words = {f"w{number}": number for number in range(100_000)}
    configure(folder, "tokenizer.json", model={"type": "WordLevel", "vocab": words, "unk_token": "w0"})


def pickled_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(EVIL)


def another_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/evil"}))


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "only pickles": (only_pickles, "are pickles"),
    "a pickle by another name": (pickle_by_another_name, "damaged or truncated"),
    "a zip by another name": (zip_by_another_name, "damaged or truncated"),
    "a 7z by another name": (seven_zip_by_another_name, "damaged or truncated"),
    "an index of pickles": (index_of_pickles, "not the name of a safetensors file"),
    "an index that leaves": (index_that_leaves, "not the name of a safetensors file"),
    "a link to passwords": (link_to_passwords, "damaged or truncated"),
    "weights without end": (weights_without_end, "base"),
    "a configuration without end": (configuration_without_end, "config.json"),
    "a configuration of 100 MB": (configuration_of_100_megabytes, "larger than 64 MiB"),
    "a configuration of brackets": (configuration_of_brackets, "not JSON"),
    "a configuration of secrets": (configuration_of_secrets, "not JSON"),
    "a tokenizer of 100 MB": (tokenizer_of_100_megabytes, "larger than 64 MiB"),
    "a tokenizer that never ends": (cutting("(a+)+$"), "may never end"),
    "one of alternatives": (cutting("(a|aa)+$"), "may never end"),
    "one that repeats repeats": (cutting("((x*)y?)*z"), "may never end"),
    "one of ten thousand letters": (cutting("a?" * 10_000), "may never end"),
    "one that is none": (cutting("(((("), "tokenizer cannot be read"),
    "a tokenizer of a panic": (tokenizer_of_a_panic, "tokenizer cannot be read"),
    "tokens beyond the model": (tokens_beyond_the_model, "100000|tokens, its embedding"),
    "a pickled tokenizer": (pickled_tokenizer, "tokenizer"),
    "an adapter beside": (another_adapter, "holds an adapter beside"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_folder_is_refused(name: str, folder: Path, attack: Attack):
    spoil, telling = SPOILT[name]
    spoil(folder)
    attack.refused("train", "recipe.yaml", telling=telling, within=4.0)
    assert not (attack.work / "pwned").exists()


def test_a_tokenizer_that_gives_up(folder: Path, attack: Attack):
    cutting("a*a*a*a*a*a*a*a*$")(folder)
    long = {"messages": [{"role": "user", "content": "a" * 4000 + "!"}, {"role": "assistant", "content": "yes"}]}
    attack.rows([long])
    attack.refused("train", "recipe.yaml", telling="tokenizer gives up|may never end", within=6.0)


@pytest.mark.parametrize(
    ("changes", "telling"),
    [
        ({"_class_name": "EvilPipeline", "unet": ["canary_module", "Unet"]}, "EvilPipeline"),
        ({"_class_name": ["evil", "Pipeline"]}, "model_index"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["canary_module", "UNet2DConditionModel"]}, "unet|part"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "../../evil"]}, "unet|part"),
    ],
)
def test_a_pipeline_is_refused(changes: dict[str, Any], telling: str, attack: Attack):
    pytest.importorskip("diffusers")
    attack.write("base/model_index.json", json.dumps(changes))
    attack.write("base/unet/config.json", "{}")
    attack.rows([{"image": "a.png", "text": "a"}])
    attack.recipe(base="base", trainer={"task": "text_to_image"})
    attack.refused("train", "recipe.yaml", telling=f"{telling}|image|base", within=6.0, swelling=600)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "evil--x", "a/b/c", "https://evil/x", "file:///etc/passwd"])
def test_a_name_that_is_no_hub_id(name: str, attack: Attack):
    attack.recipe(model={"name_or_path": name})
    attack.refused("train", "recipe.yaml", telling=r"no such file or folder|no tokenizer in this folder")
