"""Training that changed nothing is an error, whatever its loss was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.test_loop import BASE, run

import peftctl
from peftctl.engine import disk
from peftctl.errors import NothingLearned, StorageError
from peftctl.tasks.sft import SFT
from peftctl.training import checkpoint


class Deaf(SFT):
    """A loss that does not depend on the model."""

    def sums(self, model: Any, batch: Any) -> Any:
        found = super().sums(model, batch)
        return {**found, "loss": found["loss"] * 0 + 1}


def test_no_gradient(tmp_path: Path):
    with pytest.raises(NothingLearned, match="step 1: no gradient reached what is trained") as caught:
        run(tmp_path, replace(BASE, task=Deaf()))
    assert "target_modules" in str(caught.value)


def test_an_adapter_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(NothingLearned, match="step 6: what was trained is as it was before the first step"):
        run(tmp_path)
    found, _ = checkpoint.latest(tmp_path)  # there is something to look at
    assert found is not None
    with pytest.raises(NothingLearned):  # resumed, it still knows how it began
        run(tmp_path, resume_from=checkpoint.load(tmp_path / "step-000005"))


def test_a_last_step_that_changes_nothing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    run(tmp_path, resume_from=checkpoint.load(tmp_path / "step-000005"))


def test_an_adapter_that_does_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lying(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file({name: value * 1.01 for name, value in tensors.items()}, path, metadata)

    from tiny import build, stir

    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=4))
    stir(model)
    monkeypatch.setattr(disk, "save_file", lying)
    with pytest.raises(StorageError, match=r"lora_A\.weight` does not read back as it was written"):
        peftctl.save(model, tmp_path / "adapter")
    monkeypatch.undo()
    peftctl.save(model, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")
