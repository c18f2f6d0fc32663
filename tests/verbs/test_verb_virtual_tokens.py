"""Runs whose adapter stands around the whole model: trained, resumed to the bit, evaluated, exported, not merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from safetensors.torch import load_file

import peftctl
from peftctl.training.journal import Journal

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "prompt", "num_virtual_tokens": 4},
    "text": {"type": "prompt", "num_virtual_tokens": 4, "init": "text", "init_text": "is it so?"},
    "mlp": {"type": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "lstm": {
        **{"type": "p_tuning", "num_virtual_tokens": 4, "encoder": "lstm"},
        **{"encoder_hidden_size": 8, "encoder_dropout": 0.3},
    },
    "prefix": {"type": "prefix", "num_virtual_tokens": 4},
    "projection": {"type": "prefix", "num_virtual_tokens": 4, "projection": True, "encoder_hidden_size": 8},
}


class Killed(BaseException):
    """Instead of a signal that no process survives."""


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Journal.write

    def write(self: Journal, event: Any) -> None:
        if event["event"] == "step" and event["step"] == step + 1:
            raise Killed
        real(self, event)

    monkeypatch.setattr(Journal, "write", write)


@pytest.mark.parametrize("variant", METHODS)
def test_an_interrupted_run_ends_as_one_in_one_go(variant, made: Callable[..., Any], tmp_path: Path, monkeypatch):
    recipe = made() | {"method": METHODS[variant]}
    peftctl.train(recipe, output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(5, patch)
        with pytest.raises(Killed):
            peftctl.train(recipe, output=tmp_path / "parts")
    peftctl.train(recipe, output=tmp_path / "parts", resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    files = sorted(path.name for path in (whole / "adapter").glob("*.safetensors"))
    assert ("resume.safetensors" in files) == (variant in ("mlp", "lstm", "projection"))
    for name in files:
        assert (parts / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert [e["loss"] for e in tiny_chat.steps(parts)] == [e["loss"] for e in tiny_chat.steps(whole)]


@pytest.mark.parametrize("variant", ["prompt", "lstm", "prefix"])
def test_a_run_is_used_like_any_other_but_not_merged(variant, made: Callable[..., Any], tmp_path: Path, cli):
    run, out = tmp_path / "run", tmp_path / "exported"
    peftctl.train(made(eval={"labels": tiny_chat.LABELS}) | {"method": METHODS[variant]}, output=run)
    done = cli("eval", run)
    assert done.code == 0, done.err
    done = cli("generate", run, "is it a?")
    assert done.code == 0, done.err
    done = cli("export", run, "--format", "peft", "--output", out)
    assert done.code == 0, done.err
    assert (out / "adapter_model.safetensors").read_bytes() == (run / "adapter/adapter_model.safetensors").read_bytes()
    done = cli("merge", run, "--output", tmp_path / "merged")
    assert done.code == 1
    assert "it gives the model more to read and changes no weight" in done.err
    assert not (tmp_path / "merged").exists()


def test_a_prefix_is_not_trained_with_gradient_checkpointing(made: Callable[..., Any], tmp_path: Path):
    recipe = made(trainer={"gradient_checkpointing": True}) | {"method": METHODS["prefix"]}
    with pytest.raises(peftctl.PeftctlError, match="key/value cache") as caught:
        peftctl.train(recipe, output=tmp_path / "run")
    assert "p_tuning" in str(caught.value.problems[0])


def test_training_goes_on_from_a_folder_of_hf_peft(made: Callable[..., Any], tmp_path: Path):
    peftctl.train(made() | {"method": METHODS["mlp"]}, output=tmp_path / "first")
    (tmp_path / "first/adapter/resume.safetensors").unlink()  # which HF PEFT does not write
    flat = {"type": "p_tuning", "num_virtual_tokens": 4, "encoder": "none"}
    more = made() | {"method": {**flat, "init_from": str(tmp_path / "first/adapter")}}
    peftctl.train(more, output=tmp_path / "second")
    wrong = made() | {"method": {**METHODS["mlp"], "init_from": str(tmp_path / "first/adapter")}}
    with pytest.raises(peftctl.PeftctlError, match="not the network") as caught:
        peftctl.train(wrong, output=tmp_path / "third")
    assert "encoder: none" in str(caught.value.problems[0].hint)
    losses = [[e["loss"] for e in tiny_chat.steps(tmp_path / run)] for run in ("first", "second")]
    assert losses[1][0] != losses[0][0]


def test_a_network_is_gone_on_with(made: Callable[..., Any], tmp_path: Path):
    peftctl.train(made() | {"method": METHODS["lstm"]}, output=tmp_path / "first")
    more = {**METHODS["lstm"], "init_from": str(tmp_path / "first/adapter")}
    quiet = made(trainer={"learning_rate": 1e-8}) | {"method": more}
    peftctl.train(quiet, output=tmp_path / "second")
    first, second = (load_file(tmp_path / run / "adapter/resume.safetensors") for run in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
