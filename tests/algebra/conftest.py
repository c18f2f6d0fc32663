from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, stir

import peftctl


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA of a model of the zoo, with random values that are a function of `seed`."""

    def made(seed: int = 0, shape: str = "llama", method: str = "lora", **fields: Any) -> Path:
        defaults = {"r": 4, "alpha": 8} if method == "lora" else {}
        model = peftctl.attach(build(shape), peftctl.METHODS[method](**defaults | fields))
        stir(model, seed)
        return peftctl.save(model, tmp_path / f"adapter-{seed}")

    return made


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """Writes the model of the zoo that `make` adapts."""

    def made(shape: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / f"base-{shape}"
        build(shape).to(dtype).save_pretrained(folder)
        return folder

    return made
