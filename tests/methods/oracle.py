"""HF PEFT as the oracle of a method: folders cross both ways with equal logits and equal greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from tiny import build, greedy, logits, stir
from torch import nn

import peftctl

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "mixtral": "CAUSAL_LM"}
"""`task_type` by shape; a picture classifier has none in PEFT."""


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal logits on unpadded rows in float32, equal greedy tokens where the model generates.

    PEFT returns logits of virtual tokens too, before those of the input.
    """
    here, there = logits(ours), logits(theirs)
    there = there[:, -here.shape[1] :] if here.ndim == 3 else there
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
    if ours.can_generate():
        assert greedy(ours) == greedy(theirs)


def peft_reads_ours(name: str, method: str, fields: dict[str, Any], folder: Path) -> None:
    """What we save on the shape `name` loads in PEFT and computes the same, which is not what the base computes.

    PEFT adds `classifier` to what is trained of a sequence classifier, so for `bert` the fields have to name it.
    """
    ours = peftctl.attach(build(name), peftctl.METHODS[method](**fields))
    stir(ours)
    peftctl.save(ours, folder)
    theirs = peft.PeftModel.from_pretrained(build(name), folder).eval()
    assert not torch.allclose(logits(ours), logits(build(name)), atol=1e-3)
    assert_same(ours, theirs)


def we_read_peft(name: str, config: peft.PeftConfig, folder: Path) -> nn.Module:
    """What PEFT saves with `config` loads here and computes the same; returns our model."""
    theirs = peft.get_peft_model(build(name), config).eval()
    stir(theirs)
    theirs.save_pretrained(folder)
    ours = peftctl.load(build(name), folder).eval()
    assert_same(ours, theirs)
    return ours


def written_back(ours: nn.Module, theirs: Path, folder: Path, ignoring: frozenset[str] = frozenset()) -> None:
    """What `we_read_peft` read from `theirs` is written to `folder` as it was: tensors, and all keys of the config."""
    peftctl.save(ours, folder)
    a, b = (load_file(where / "adapter_model.safetensors") for where in (theirs, folder))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (json.loads((where / "adapter_config.json").read_text()) for where in (theirs, folder))
    assert a.keys() == b.keys()
    assert {key for key in a if a[key] != b[key]} <= {"target_modules"} | ignoring
