"""What a run needs, said before it and compared after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import peftctl
from peftctl.errors import OutOfMemory
from peftctl.verbs import forecast
from peftctl.verbs.bench import bench
from peftctl.verbs.plan import plan


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path / "home"))


def test_rows_that_are_here_are_counted(made: Callable[..., Any], cli: Callable[..., SimpleNamespace]):
    found = plan(made())
    said = peftctl.train(made(), dry_run=True)
    assert found["parameters"]["trained"] == said["trainable_parameters"]
    assert found["parameters"]["total"] == said["total_parameters"]
    assert found["adapter_bytes"] == said["adapter_bytes"]
    assert (found["data"]["rows"], found["data"]["tokens"]) == (11, said["tokens"])
    assert found["data"]["steps"] == said["steps"]
    assert found["memory"]["total"] == sum(found["memory"][key] for key in found["memory"] if key != "total")
    assert found["seconds"]["total"] > 0


def test_a_well_known_model_is_planned_without_network_rows_or_gpu(cli: Callable[..., SimpleNamespace]):
    words = ("plan", "llama7b-qlora", "model.device=cuda", "--fit", "6GB")
    said = cli(*words)
    assert (said.code, said.err) == (0, "")
    assert "39,976,960 of 6,778,392,576 parameters train" in said.out
    assert "trainer.micro_batch_size=1" in said.out
    found = json.loads(cli(*words, "--json").out)
    assert found["peak"] > 6e9
    assert found["fit"]["fits"]
    assert [change["peak"] < 6e9 for change in found["fit"]["changes"]] == [True]


def test_a_gpu_may_hand_layer_inputs_to_the_machine(cli: Callable[..., SimpleNamespace]):
    words = ("plan", "llama7b-qlora", "--fit", "5GB", "--json")
    card, processor = (json.loads(cli(*words, f"model.device={device}").out)["fit"] for device in ("cuda", "cpu"))
    wanted = ["trainer.micro_batch_size=1", "trainer.gradient_checkpointing=offload"]
    assert [change["set"] for change in card["changes"]] == wanted
    assert not any("offload" in change["set"] for change in processor["changes"])


@pytest.mark.parametrize("recipe", ["sd15-style", "blip-captioning"])
def test_what_is_not_planned_says_so(recipe: str, cli: Callable[..., SimpleNamespace]):
    said = cli("plan", recipe)
    assert said.code == 1
    assert said.err.startswith("error: plan: models that see or draw are not planned yet\n")


def test_what_cannot_be_made_fit_ends_in_4(cli: Callable[..., SimpleNamespace]):
    said = cli("plan", "llama7b-qlora", "model.device=cuda", "--fit", "1GB")
    assert said.code == 4
    assert "does not fit 0.93 GiB" in said.out
    assert cli("plan", "llama7b-qlora", "--fit", "much").code == 2


def test_a_run_compares_and_keeps_what_was_foreseen(made: Callable[..., Any], tmp_path: Path):
    told: list[dict[str, Any]] = []
    result = peftctl.train(made(trainer={"steps": 1}), output=tmp_path / "run", listen=told.append)
    assert result["predicted_memory"] > 0
    [rows] = [dict(event["rows"]) for event in told if event["event"] == "trained"]
    assert "GiB, predicted" in rows["memory"]
    kept = json.loads((tmp_path / "run" / "provenance.json").read_text())["memory"]
    assert kept == {"peak": result["peak_memory"], "predicted": result["predicted_memory"]}


def test_what_cannot_fit_is_not_loaded(made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forecast, "available", lambda device: 2**20)
    with pytest.raises(OutOfMemory, match=r"does not fit: about .* GiB needed, 0\.0 free on cpu"):
        peftctl.train(made(), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_few_steps_are_measured_and_nothing_is_kept(made: Callable[..., Any], tmp_path: Path):
    recipe = made(dataset={"train": "not-here.jsonl", "max_length": 24}, model={"load_format": "dummy"})
    found = bench(recipe, steps=3)
    assert (found["steps"], found["tokens_per_second"] > 0) == (2, True)
    assert found["peak_memory"] > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trainer"),
    [
        ({"type": "lora", "r": 8}, {}),
        ({"type": "lora", "r": 8}, {"gradient_checkpointing": True}),
        ({"type": "full"}, {"optimizer": "adamw_8bit"}),
    ],
    ids=str,
)
def test_the_plan_is_right(method: dict[str, Any], trainer: dict[str, Any], tmp_path: Path):
    """In a process of its own: the peak of this one is anybody's."""
    import subprocess
    import sys

    rows = [{"text": f"{number} and so it goes on, {'one after the other, ' * 60}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M", "load_format": "dummy", "dtype": "bfloat16"},
        "method": method,
        "dataset": {"train": "rows.jsonl", "max_length": 256},
        "trainer": {"task": "text", "steps": 2, "batch_size": 2, "micro_batch_size": 2, **trainer},
        "output": "run",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = [sys.executable, "-m", "peftctl", "train", "recipe.yaml", "--json"]
    done = json.loads(subprocess.run(words, cwd=tmp_path, capture_output=True, check=True).stdout)
    # on a busy machine the same run was seen to hold 8 % more than on an idle one, for which the bound is 0.95
    assert 0.9 <= done["predicted_memory"] / done["peak_memory"] <= 1.15
