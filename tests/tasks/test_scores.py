"""The reference of preferences is computed once where rows are seen again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import peftctl
from peftctl.tasks import scores as module
from tests.tiny_chat import recipe, steps, write_base, write_rows
from tests.tiny_preferences import chats, feedback


@pytest.mark.parametrize("task", ["dpo", {"type": "dpo", "variant": "ipo"}, "kto"])
def test_later_epochs_read_what_the_reference_said(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    made = chats(8) if task != "kto" else feedback(chats(8))
    rows = write_rows(tmp_path / "rows.jsonl", made)
    trainer = {"task": task, "steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3}
    asked = recipe(base, rows, method={"dropout": 0.0}, trainer=trainer)
    calls: list[int] = []
    inside = module.reference

    def watched(model: torch.nn.Module) -> Any:
        if not isinstance(next(model.parameters()), FakeTensor):  # the plan takes a step without content
            calls.append(1)
        return inside(model)

    monkeypatch.setattr(module, "reference", watched)
    peftctl.train(asked, output=tmp_path / "kept")
    assert len(calls) == 1
    monkeypatch.setattr(module, "keep_reference", lambda model, batches: None)
    monkeypatch.setattr("peftctl.tasks.preference.keep_reference", lambda model, batches: None)
    monkeypatch.setattr("peftctl.tasks.kto.keep_reference", lambda model, batches: None)
    peftctl.train(asked, output=tmp_path / "anew")
    assert len(calls) > 6
    kept, anew = (steps(tmp_path / name) for name in ("kept", "anew"))
    for name in ("loss", "reward_margin", "chosen_reward"):
        expected = pytest.approx([step[name] for step in anew], rel=1e-4, abs=1e-6)
        assert [step[name] for step in kept] == expected
