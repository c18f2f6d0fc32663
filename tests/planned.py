"""Estimates of runs that nobody starts."""

from __future__ import annotations

from typing import Any

import torch

from peftctl import recipe as recipes
from peftctl.planning.estimate import Estimate, estimate
from peftctl.planning.step import MicroBatch


def estimated(name: str, rows: int = 1, length: int = 2048, **blocks: Any) -> Estimate:
    """The estimate for a GPU that need not be here, of rows of equal length, all of them trained."""
    made: dict[str, Any] = {
        "model": {"name_or_path": name, "device": "cuda", "dtype": "bfloat16"},
        "method": {"type": "lora", "r": 8},
        "dataset": {"train": "rows.jsonl"},
        "trainer": {"gradient_checkpointing": True, "batch_size": rows, "micro_batch_size": rows},
        "output": "run",
    }
    for key, block in blocks.items():
        made[key] = block if key == "method" else {**made[key], **block}
    recipe = recipes.coerce(made)
    ids = torch.randint(5, 90, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return estimate(recipe, recipe.trainer.task, MicroBatch.of(batch))
