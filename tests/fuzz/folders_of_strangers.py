"""Adapters and checkpoints: folders of tensors and of what is said of them."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from pathlib import Path
from random import Random

import tiny
import torch
from fuzz import corpora
from fuzz.mutations import Case, Mutator, changed, safetensors_header
from fuzz.target import Target, lay

import peftctl
from peftctl.training import checkpoint


def adapter(folder: Path) -> Target:
    """adapter_config.json and the tensors beside it, against one tiny Llama that stays bit for bit as it was."""
    corpus = corpora.adapters(folder / "good")
    model = tiny.build("llama")
    before = corpora.weights(model)
    live = dict([*model.named_parameters(), *model.named_buffers()])
    versions = [t._version for t in live.values()]
    shown = folder / "adapter"
    shown.mkdir()
    seen = 0

    def check(case: Case) -> None:
        nonlocal seen
        seen += 1
        lay(shown, case)
        try:
            peftctl.load(model, shown)
            assert hasattr(model, "peft_methods"), "accepted, and nothing is attached"
            peftctl.detach(model)
        finally:
            assert [t._version for t in live.values()] == versions, "the base was written to"
            if seen % 256 == 1:
                now = corpora.weights(model)
                assert now.keys() == before.keys(), "the base has other parts"
                assert all(torch.equal(now[name], before[name]) for name in before), "the base is another one"
            assert not vars(model).get("peft_methods"), "something stayed attached"

    def header(random: Random, case: Case) -> None:
        names = [name for name in case if name.endswith(".safetensors")]
        if names:
            safetensors_header(random, case, random.choice(names))

    def without(random: Random, case: Case) -> None:
        if random.random() < 0.1:
            del case[random.choice(sorted(case))]
        else:
            other = random.choice(corpus)
            name = random.choice(sorted(other))
            case[name] = other[name]

    def config(random: Random, case: Case) -> None:
        name = "adapter_config.json"
        if name in case:
            case[name] = with_key(random, case[name])

    return Target(Mutator(corpus, [header, header, config, without]), check)


def with_key(random: Random, data: bytes) -> bytes:
    """A configuration with a key of HF PEFT's said otherwise, so that strange values meet the keys that are read."""
    try:
        config = json.loads(data)
        key = random.choice(KEYS)
        config[key] = changed(random, [deepcopy(config.get(key))])[:1] or None
        if isinstance(config[key], list) and random.random() < 0.7:
            config[key] = config[key][0]
        return json.dumps(config).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, TypeError, AttributeError):
        return data


KEYS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "modules_to_save", "peft_type"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "trainable_token_indices", "exclude_modules", "use_dora"),
    *(
        "layers_to_transform",
        "layers_pattern",
        "feedforward_modules",
        "num_virtual_tokens",
        "token_dim",
        "loftq_config",
    ),
    *("num_layers", "encoder_hidden_size", "prefix_projection", "d_initial", "projection_prng_key", "save_projection"),
    *(
        "init_r",
        "target_r",
        "oft_block_size",
        "inference_mode",
        "task_type",
        "base_model_name_or_path",
        "fan_in_fan_out",
    ),
)


def checkpoints(folder: Path) -> Target:
    """A checkpoint folder, half of the time with a manifest that agrees with what was spoilt."""
    corpus = corpora.checkpoints(folder / "run")
    shown = folder / "step-000002"
    shown.mkdir()

    def check(case: Case) -> None:
        lay(shown, case)
        checkpoint.load(shown)

    def sealed(random: Random, case: Case) -> None:
        name = random.choice([name for name in case if name != "manifest.json"])
        if name.endswith(".safetensors") and random.random() < 0.6:
            safetensors_header(random, case, name)
        else:
            case[name] = Mutator([{name: case[name]}]).case(random)[name]
        listed = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in case.items()
            if name != "manifest.json"
        }
        case["manifest.json"] = json.dumps({"format": 1, "files": listed}).encode()

    return Target(Mutator(corpus, [sealed]), check)
