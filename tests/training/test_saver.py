"""A disk that refuses a checkpoint costs that checkpoint; one that goes on refusing ends the run, and nothing else."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.test_loop import BASE, digest, losses, rows, run

from peftctl.errors import NonFiniteError, StorageError
from peftctl.tasks.sft import SFT
from peftctl.training import checkpoint, filesystem
from peftctl.training.saver import short_of_room
from peftctl.training.signals import Stop


@contextmanager
def full(when: Callable[[], bool]) -> Iterator[None]:
    """A disk that is full as long as `when` says so."""
    own = filesystem.write

    def write(path: Path, chunks: Any) -> Any:
        if not when():
            return own(path, chunks)
        with filesystem.guarded(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem, "write", write)
        yield


def saved(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events if event["event"] == "saved"]


def test_a_checkpoint_is_missed_and_the_next_is_made(tmp_path: Path):
    straight, expected, _ = run(tmp_path / "straight")
    events: list[dict[str, Any]] = []
    with full(lambda: sum(event["event"] == "step" for event in events) in (2, 3)):
        model, _, _ = run(tmp_path / "full", log=events.append)
    assert saved(events) == [1, 4, 5, 6]
    warnings = [event for event in events if event["event"] == "warning"]
    assert ["step 2: no checkpoint: " in event["text"] for event in warnings] == [True, False]
    assert "no space left on the disk; the ones before are as they were" in warnings[0]["text"]
    assert "free some space" in warnings[0]["hint"]
    assert digest(model) == digest(straight)
    assert losses(events) == losses(expected)


def test_three_times_in_a_row_end_the_run(tmp_path: Path):
    events: list[dict[str, Any]] = []
    with (
        full(lambda: len(losses(events)) > 2),
        pytest.raises(StorageError, match=r"step 5: no checkpoint could be written, 3 times in a row: .*no space left"),
    ):
        run(tmp_path, log=events.append)
    found, skipped = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, skipped) == (2, [])


def test_a_best_one_that_is_not_kept_is_not_gone_back_to(tmp_path: Path):
    trainer = replace(BASE, steps=4, eval_every=1, save_every=100)
    events: list[dict[str, Any]] = []
    with full(lambda: len(losses(events)) in (2, 3)):
        _, _, progress = run(tmp_path, trainer, log=events.append, eval_rows={"": rows(8, seed=9)})
    assert progress.best_step in saved(events)
    assert not {2, 3} & {*saved(events)}


def test_a_signal_says_that_nothing_could_be_saved(tmp_path: Path):
    stop = Stop()
    stop.requested = "SIGTERM"
    with (
        full(lambda: True),
        pytest.raises(StorageError, match="stopped by SIGTERM after step 1 of 6, not saved: the disk refused"),
    ):
        run(tmp_path, stop=stop)


class Broken(SFT):
    """A loss that is no number."""

    def sums(self, model: Any, batch: Any) -> Any:
        found = super().sums(model, batch)
        return {**found, "loss": found["loss"] * math.nan}


def test_a_loss_that_is_no_number_is_told_though_the_disk_is_full(tmp_path: Path):
    with full(lambda: True), pytest.raises(NonFiniteError, match="step 1: loss nan") as caught:
        run(tmp_path, replace(BASE, task=Broken()))
    assert "is saved" not in str(caught.value)


def test_what_checkpoints_need_is_compared_with_what_is_free(tmp_path: Path):
    assert short_of_room(tmp_path / "not" / "there", [torch.zeros(10)], keep=2) is None
    told = short_of_room(tmp_path, [torch.empty(2**50, device="meta")], keep=2)
    assert told is not None
    assert "GiB are free, and checkpoints may need 67108864.0" in told
