"""Methods without a place in HF PEFT, from recipe to evaluation: bottlenecks, a fusion of them, LoReFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from safetensors.torch import load_file

import peftctl
from peftctl.errors import AdapterError, PeftctlError, RunError
from peftctl.training import checkpoint
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.generate import generate
from peftctl.verbs.mortal import one_thread

REFT = {"type": "reft", "r": 2, "first": 2, "last": 2, "tie_weights": False, "dropout": 0.1}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def recipe(made: Callable[..., Any], method: dict[str, Any], **blocks: Any) -> dict[str, Any]:
    """A recipe with this method alone; `made` would lay it over LoRA's fields."""
    return {**made(**blocks), "method": method}


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory, made: Callable[..., Any]) -> list[Path]:
    """Runs of two bottlenecks."""
    folders = [tmp_path_factory.mktemp("bottlenecks") / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        method = {"type": "bottleneck", "reduction_factor": 4, "variant": "houlsby"}
        with one_thread():
            peftctl.train(recipe(made, method, seed=seed), output=folder)
    return folders


@pytest.fixture
def fusion(two: list[Path], tmp_path: Path, made: Callable[..., Any]) -> dict[str, Any]:
    """A recipe that fuses copies of them, named from the folder of the recipe."""
    for folder in two:
        shutil.copytree(folder / "adapter", tmp_path / folder.name)
    return recipe(made, {"type": "fusion", "adapters": ["./a", "./b"]}, eval={"labels": tiny_chat.LABELS})


def test_a_fusion_of_two_runs_needs_them_for_training_alone(
    fusion: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    peftctl.train(fusion, output=tmp_path / "run")
    kept = tensors(tmp_path / "run")
    for index, folder in enumerate(("a", "b")):
        for name, tensor in load_file(tmp_path / folder / "adapter_model.safetensors").items():
            assert torch.equal(kept[name.replace(".bottleneck.", f".bottlenecks.{index}.")], tensor)
        shutil.rmtree(tmp_path / folder)
    figures = evaluate(str(tmp_path / "run"))["figures"]
    assert figures["adapter"]["loss"] < figures["base"]["loss"]


def test_a_fusion_of_bottlenecks_of_another_base(
    fusion: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    other = tiny_chat.write_base(tmp_path / "other", seed=1)  # of the same shape
    with pytest.raises(RunError, match="not the base that `a` was trained on"):
        peftctl.train({**fusion, "model": {**fusion["model"], "name_or_path": str(other)}}, output=tmp_path / "run")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(AdapterError, match="b: no such adapter folder"):
        peftctl.train(fusion, output=tmp_path / "run")


@pytest.mark.parametrize("kind", ["bottleneck", "fusion", "reft"])
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str, fusion: dict[str, Any], made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    methods = {"bottleneck": {"type": "bottleneck", "reduction_factor": 4, "dropout": 0.1}, "reft": REFT}
    wanted = fusion if kind == "fusion" else recipe(made, methods[kind])
    peftctl.train(wanted, output=tmp_path / "whole")
    save = checkpoint.save

    def save_and_stop(folder: Path, step: int, **rest: Any) -> Path:
        path = save(folder, step, **rest)
        if step == 4:
            raise PeftctlError("stopped by the test")
        return path

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    with pytest.raises(PeftctlError, match="stopped by the test"):
        peftctl.train(wanted, output=tmp_path / "resumed")
    monkeypatch.setattr(checkpoint, "save", save)
    peftctl.train(wanted, output=tmp_path / "resumed", resume=True)
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_edits_of_the_prompt_are_scored_and_generated_from(made: Callable[..., Any], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = recipe(
        made, REFT, eval={"labels": tiny_chat.LABELS}, trainer={"gradient_checkpointing": True, "learning_rate": 0.3}
    )
    peftctl.train(wanted, output=tmp_path / "run")
    figures = evaluate(str(tmp_path / "run"))["figures"]
    assert figures["adapter"]["loss"] < figures["base"]["loss"]
    run = str(tmp_path / "run")
    assert generate(run, "is it a?", max_new_tokens=8) != generate(run, "is it a?", max_new_tokens=8, base=True)
