"""Estimates of models that nobody loads: parameters exactly, memory near what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planned import estimated
from transformers import LlamaConfig

from peftctl import recipe as recipes
from peftctl.models.head import SEQUENCES
from peftctl.planning.estimate import estimate
from peftctl.planning.step import MicroBatch

GB = 10**9
QLORA = {"type": "lora", "r": 16}


@pytest.fixture
def llama_65b(tmp_path: Path) -> str:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64, vocab_size=32000
    )
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return str(tmp_path)


def test_mt0_large_trains_as_many_parameters_as_everybody_says():
    blocks = {"method": {"type": "lora", "r": 8, "target_modules": ["q", "v"]}, "trainer": {"task": "seq2seq"}}
    found = estimated("bigscience/mt0-large", length=64, **blocks)
    assert found.trained == 2_359_296
    assert (found.tied, found.parameters) == (975_825_920, 1_231_940_608)


def test_llama_2_7b_needs_what_arithmetic_says():
    qlora = estimated("meta-llama/Llama-2-7b-hf", model={"quantization": "nf4"}, method=QLORA)
    assert qlora.trained == 39_976_960
    assert qlora.peak == pytest.approx(5.5 * GB, rel=0.06)
    assert qlora.memory.quantisation == pytest.approx(6.476e9 * 0.127 / 8, rel=0.01)  # 0.127 bits a weight
    lora = estimated("meta-llama/Llama-2-7b-hf")
    assert lora.memory.weights == 2 * 6_738_415_616 + 512  # and the table of rotary embeddings
    assert lora.peak == pytest.approx(15 * GB, rel=0.06)
    assert lora.flops_per_token == pytest.approx(42.2e9, rel=0.08)


def test_a_65b_fits_a_card_of_48_gb(llama_65b: str):
    found = estimated(llama_65b, model={"quantization": "nf4"}, method=QLORA)
    assert found.peak == pytest.approx(41 * GB, rel=0.08)


def test_full_fine_tuning_of_7b_takes_sixteen_bytes_a_parameter():
    found = estimated("meta-llama/Llama-2-7b-hf", length=512, method={"type": "full"})
    assert found.trained == found.parameters == 6_738_415_616
    assert found.memory.weights + found.memory.optimizer + found.memory.gradients >= 0.99 * 16 * found.parameters


def test_less_is_held_with_checkpointing_shorter_rows_and_eight_bits():
    model = "HuggingFaceTB/SmolLM2-135M"
    plain = estimated(model, length=512, trainer={"gradient_checkpointing": False})
    assert estimated(model, length=512).memory.activations < plain.memory.activations / 5
    half = estimated(model, length=256, trainer={"gradient_checkpointing": False})
    assert half.memory.activations == pytest.approx(plain.memory.activations / 2, rel=0.05)
    eight = estimated(model, length=256, method={"type": "lora", "r": 64}, trainer={"optimizer": "adamw_8bit"})
    whole = estimated(model, length=256, method={"type": "lora", "r": 64})
    assert eight.memory.optimizer < 0.3 * whole.memory.optimizer


def test_a_classifier_trains_its_head_too():
    made = {
        "model": {"name_or_path": "bert-base-uncased", "device": "cuda"},
        "method": {"type": "lora", "r": 8},
        "dataset": {"train": "rows.jsonl"},
        "trainer": {"task": "classification"},
        "output": "run",
    }
    recipe = recipes.coerce(made)
    task = recipe.trainer.task.of(SEQUENCES.with_labels(("no", "yes", "maybe")))
    ids = torch.ones(4, 64, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.ones(4, dtype=torch.long)}
    found = estimate(recipe, task, MicroBatch.of(batch))
    assert found.trained > 12 * 8 * (8 * 768 + 2 * (768 + 3072)) + 3 * 768  # all linears, and the classifier
