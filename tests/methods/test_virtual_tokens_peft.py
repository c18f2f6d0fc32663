"""Prompt, P-tuning and prefix against HF PEFT: folders cross both ways on every architecture that reads tokens."""

from __future__ import annotations

import json

import peft
import pytest
from methods.oracle import TASKS, peft_reads_ours, we_read_peft, written_back
from tiny import build

N = 4
# method, our fields, PEFT's config, its fields
VARIANTS = {
    "prompt": ("prompt", {}, peft.PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("p_tuning", {"encoder_hidden_size": 8}, peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "lstm": (
        "p_tuning",
        {"encoder": "lstm", "encoder_hidden_size": 8},
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("prefix", {}, peft.PrefixTuningConfig, {}),
    "projection": (
        "prefix",
        {"projection": True, "encoder_hidden_size": 8},
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 8},
    ),
}
CASES = [(shape, variant) for shape in TASKS for variant in VARIANTS]
WITHOUT_NETWORK = frozenset({"encoder_reparameterization_type", "prefix_projection", "modules_to_save"})
"""What we write otherwise of a folder whose network PEFT did not save; of a classifier we name the head it has."""


@pytest.mark.parametrize(("shape", "variant"), CASES)
def test_peft_reads_what_we_save(shape, variant, tmp_path):
    method, fields, _, _ = VARIANTS[variant]
    head = {"modules_to_save": ["classifier"]} if shape == "bert" else {}
    peft_reads_ours(shape, method, {"num_virtual_tokens": N, **fields, **head}, tmp_path)


@pytest.mark.parametrize(("shape", "variant"), CASES)
def test_we_read_what_peft_saves_and_write_it_back(shape, variant, tmp_path):
    _, _, config, fields = VARIANTS[variant]
    ours = we_read_peft(shape, config(task_type=TASKS[shape], num_virtual_tokens=N, **fields), tmp_path / "theirs")
    written_back(ours, tmp_path / "theirs", tmp_path / "ours", WITHOUT_NETWORK)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_of_the_model_are_written_as_peft_writes_them(variant, tmp_path):
    method, fields, config, theirs = VARIANTS[variant]
    head = {"modules_to_save": ["classifier"]}
    for shape, task in TASKS.items():
        more = head if shape == "bert" else {}
        peft_reads_ours(shape, method, {"num_virtual_tokens": N, **fields, **more}, tmp_path / shape)
        wanted = config(task_type=task, num_virtual_tokens=N, **theirs)
        made = peft.get_peft_model(build(shape), wanted).peft_config["default"]
        written = json.loads((tmp_path / shape / "adapter_config.json").read_text())
        for key in ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            assert written[key] == getattr(made, key), (shape, key)
