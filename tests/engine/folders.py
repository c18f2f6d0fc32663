"""Adapter folders to spoil, and what must hold of a model that refused one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, stir
from torch import Tensor, nn

import peftctl
from peftctl.engine.attach import methods, stacks
from peftctl.errors import PeftctlError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
B = "base_model.model.model.layers.0.self_attn.q_proj."


def made(folder: Path, **fields: Any) -> Path:
    """A LoRA folder for the tiny Llama, with values that change its logits."""
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"](**{"r": 4, "target_modules": ["q_proj"]} | fields))
    stir(model)
    return peftctl.save(model, folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Put tensors into the file of `folder`; None takes one out."""
    kept = {**tensors(folder), **changes}
    save_file({key: t for key, t in kept.items() if t is not None}, folder / WEIGHTS)


def configure(folder: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching may change."""
    return {
        "values": {key: t.detach().clone() for key, t in model.state_dict().items()},
        "trained": {key: p.requires_grad for key, p in model.named_parameters()},
        "forwards": {key for key, module in model.named_modules() if "forward" in vars(module)},
        "active": {key: stack.active for key, _, stack in stacks(model)},
        "methods": methods(model),
        "modules": [key for key, _ in model.named_modules()],
    }


@contextmanager
def refusal(model: nn.Module) -> Iterator[list[str]]:
    """Expect an error of ours, give its problems as texts, and check that `model` is as it was."""
    before, texts = state(model), []
    with pytest.raises(PeftctlError) as caught:
        yield texts
    texts += [f"{text}; {hint}" for text, hint in caught.value.problems]
    after = state(model)
    values, were = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == were.keys()
    assert all(torch.equal(values[key], were[key]) for key in were)
