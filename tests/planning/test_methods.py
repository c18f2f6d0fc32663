"""Every method is planned by its own code: what would train is what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from peftctl import recipe as recipes
from peftctl.engine.attach import attach, trained
from peftctl.methods import METHODS
from peftctl.planning.estimate import estimate
from peftctl.planning.step import MicroBatch

FIELDS: dict[str, dict[str, Any]] = {
    "layers": {"top": 1},
    "qalora": {"r": 4, "group_size": 16},
    "gralora": {"r": 4, "k": 2},
    "oft": {"block_size": 8},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.build("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", sorted(set(METHODS) - {"fusion", "bitfit"}))
def test_as_many_parameters_as_the_real_model_has(kind: str, base: Path):
    fields = {"type": kind, **FIELDS.get(kind, {})}
    made = {
        "model": {"name_or_path": str(base), "device": "cpu", "dtype": "float32"},
        "method": fields,
        "dataset": {"train": "rows.jsonl"},
        "trainer": {"batch_size": 2, "micro_batch_size": 2},
        "output": "run",
    }
    recipe = recipes.coerce(made)
    ids = torch.randint(5, 90, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    found = estimate(recipe, recipe.trainer.task, MicroBatch.of(batch))
    model = attach(tiny.build("llama"), recipe.method)
    assert found.trained == sum(p.numel() for p in trained(model).values())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.step.held["activations"] > 0
    assert found.step.flops > 0
