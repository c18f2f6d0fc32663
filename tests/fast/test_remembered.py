"""Layers below the first that is trained are computed once: the same results, and less work."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import peftctl
from peftctl import attach
from peftctl.errors import Interrupted
from peftctl.fast import faster
from peftctl.fast.remembered import Remembered
from peftctl.methods.lora import LoRA
from tests.fast.test_exact import assert_near, batch, computed, silent
from tests.tiny import build, stir
from tests.tiny_chat import chats, recipe, steps, write_base, write_rows

TOP = LoRA(r=2, target_modules=r".*layers\.1\..*proj")


@pytest.mark.parametrize("layout", [None, "flat"])
@pytest.mark.parametrize("shared", [0, 20])
def test_what_was_kept_gives_the_same_gradients(layout: Any, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build("llama").train()
    attach(model, TOP)
    stir(model)
    given, padded = batch(layout, shared), batch(None, shared)
    expected = computed(model, given)
    with faster(model, silent) as fast:
        assert fast is not None
        assert fast.trained == 1
        assert_near(computed(model, given), expected, 1e-5)
        fast.remember(padded["input_ids"], padded["attention_mask"])
        monkeypatch.setattr(model.model.layers[0].mlp.gate_proj, "weight", None)  # nobody asks for it again
        assert_near(computed(model, given), expected, 1e-5)


def test_a_row_that_was_not_kept_is_computed() -> None:
    model = build("llama").train()
    attach(model, TOP)
    given = batch(None)
    expected = computed(model, given)
    with faster(model, silent) as fast:
        assert fast is not None
        fast.remember(given["input_ids"][:2], given["attention_mask"][:2])
        assert_near(computed(model, given), expected, 1e-5)


def test_nothing_lies_below_where_the_lowest_layer_or_the_embedding_is_trained() -> None:
    for targets in ("all-linear", r".*(embed_tokens|layers\.1\..*proj)"):
        model = build("llama")
        attach(model, LoRA(r=2, target_modules=targets))
        with faster(model, silent) as fast:
            assert fast is not None
            assert fast.trained == 0


def test_there_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Remembered(8, torch.bfloat16)
    assert kept.room(1000)
    monkeypatch.setattr("peftctl.fast.remembered.LIMIT", 999 * 16)
    assert not kept.room(1000)


def test_a_run_of_several_epochs_goes_on_bit_for_bit(tmp_path: Path) -> None:
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", chats(12))
    method = {"type": "lora", "r": 2, "target_modules": r".*layers\.1\..*proj"}
    trainer = {"steps": 9, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "save_every": 2}
    asked = recipe(base, rows, method=method | {"dropout": 0.0}, trainer=trainer)
    events: list[dict[str, Any]] = []
    peftctl.train(asked, output=tmp_path / "whole", listen=events.append)
    assert any("computed once" in event.get("text", "") for event in events)

    def interrupt(event: Any) -> None:
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        peftctl.train(asked, output=tmp_path / "parts", listen=interrupt)
    peftctl.train(asked, output=tmp_path / "parts", resume=True)
    adapters = [(tmp_path / one / "adapter" / "adapter_model.safetensors").read_bytes() for one in ("whole", "parts")]
    assert adapters[0] == adapters[1]
    off = recipe(base, rows, method=method | {"dropout": 0.0}, trainer=trainer | {"fast": "off"})
    peftctl.train(off, output=tmp_path / "off")
    losses = [[step["loss"] for step in steps(tmp_path / one)] for one in ("whole", "off")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
