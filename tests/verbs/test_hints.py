"""Advice while training: said once, and only when the figures call for it."""

from __future__ import annotations

import math
import random

import pytest
import tiny_chat
import torch

from peftctl import recipe as recipes
from peftctl.errors import OutOfMemory
from peftctl.verbs.hints import Hints, memory_watched, smaller
from peftctl.verbs.mortal import one_thread
from peftctl.verbs.train import train


def recipe(*changes: str, type: str = "lora"):
    data = {"model": {"name_or_path": "a/b"}, "method": {"type": type}, "dataset": {"train": "x.jsonl"}, "output": "o"}
    return recipes.build(recipes.documents.parse(recipes.to_yaml(data), "recipe"), recipes.Path("."), changes)


def said(losses, evaluations=(), *changes: str):
    """The warnings of a run with these losses; `evaluations` is step -> loss."""
    heard: list[dict] = []
    hints = Hints(recipe(*changes), heard.append)
    for step, loss in enumerate(losses, start=1):
        hints({"event": "step", "step": step, "steps": len(losses), "loss": loss})
        if step in dict(evaluations):
            hints({"event": "eval", "step": step, "loss": dict(evaluations)[step]})
    assert sum(event["event"] != "warning" for event in heard) == len(losses) + len(evaluations), "all passed on"
    return [event for event in heard if event["event"] == "warning"]


def noisy(mean, steps=200, seed=0):
    draw = random.Random(seed)
    return [mean(step / steps) + draw.gauss(0, 0.1) for step in range(steps)]


def test_a_flat_loss_is_told_once():
    (warning,) = said(noisy(lambda t: 2.0), (), "trainer.learning_rate=1e-6", "method.r=16")
    assert "does not fall" in warning["text"]
    assert "`trainer.learning_rate` (1e-06 now)" in warning["hint"]
    assert "`method.r` (16 now)" in warning["hint"]


@pytest.mark.parametrize("mean", [lambda t: 2 - t, lambda t: 1 + math.exp(-5 * t), lambda t: 2 - 0.4 * t])
def test_a_falling_loss_is_not(mean):
    assert said(noisy(mean)) == []


def test_a_rising_loss_is_told():
    assert len(said(noisy(lambda t: 1 + t))) == 1


def test_a_short_run_says_nothing():
    assert said([2.0] * 20) == []


def test_overfitting_is_told_once():
    falling = noisy(lambda t: 2 - 1.9 * t)
    rising = {40: 1.5, 80: 1.4, 120: 1.5, 160: 1.6, 200: 1.7}
    (warning,) = said(falling, rising.items(), "trainer.weight_decay=0.1")
    assert "best 1.4 at step 80" in warning["text"]
    assert "`trainer.weight_decay` (0.1 now)" in warning["hint"]


@pytest.mark.parametrize(
    "evaluations",
    [
        {40: 1.5, 80: 1.4, 120: 1.3},  # falls
        {40: 1.5, 80: 1.4, 120: 1.405},  # a rise within noise, and once
        {40: 1.5, 80: 1.6, 120: 1.4, 160: 1.5},  # up and down
    ],
)
def test_evaluation_that_does_not_rise_for_long_is_not(evaluations):
    assert said(noisy(lambda t: 2 - 1.9 * t), evaluations.items()) == []


def test_without_memory_the_cheapest_change_comes_first():
    settings = ["trainer.micro_batch_size=8"]
    for expected, change in [
        ("trainer.micro_batch_size=4", "trainer.micro_batch_size=1"),
        ("trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing=true"),
        ("model.quantization=nf4", "model.quantization=nf4"),
        ("trainer.optimizer=adamw_8bit", "trainer.optimizer=adamw_8bit"),
        ("dataset.max_length", "seed=1"),
    ]:
        assert expected in smaller(recipe(*settings))
        settings.append(change)


def test_what_a_method_refuses_is_not_proposed():
    assert "gradient_checkpointing" not in smaller(recipe("trainer.micro_batch_size=1", type="prefix"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_an_error_of_its_own(error):
    with pytest.raises(OutOfMemory, match="out of memory in training") as caught, memory_watched(recipe()):
        raise error
    assert caught.value.exit_code == 4
    assert "micro_batch_size=2" in (caught.value.problems[0].hint or "")


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug"), memory_watched(recipe()):
        raise RuntimeError("a bug")


def test_a_run_hears_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_rows = tiny_chat.write_rows(tmp_path / "train.jsonl", tiny_chat.chats(8))
    trainer = {"steps": 30, "batch_size": 4, "learning_rate": 1e-9}
    written = tiny_chat.recipe(tiny_chat.write_base(tmp_path / "base"), train_rows, trainer=trainer)
    heard: list[dict] = []
    with one_thread():
        train(written, listen=heard.append)
    assert [event["hint"] for event in heard if event["event"] == "warning"] == [
        "raise `trainer.learning_rate` (1e-09 now) or `method.r` (4 now); `peftctl data` shows what is trained"
    ]
