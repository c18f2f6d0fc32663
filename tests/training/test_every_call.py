"""Killed at any call of the disk, a real run goes on to the end that it would have had; every method."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from faulty_disk import Died, FaultyDisk, installed
from training.test_resume_matrix import LLAMAS, Kind, Trial

from peftctl.training import checkpoint

SHORT = Kind({"steps": 4})


def killed(method: str, place: Path, every: int) -> list[str]:
    """What went wrong after deaths at every so many calls of a run of four steps and checkpoints."""
    trial = Trial(method, SHORT, place, keep=2)
    with installed(FaultyDisk()) as disk:
        expected, losses = trial.run()
    failures = []
    for at in range(every // 2, len(disk.calls), every):
        shutil.rmtree(place / "from-0")
        with suppress(Died), installed(FaultyDisk(at=at)):
            trial.run()
        found, torn = checkpoint.latest(place / "from-0")
        if found is not None:
            (place / "from-0").rename(place / f"from-{found.step}")
            found = checkpoint.load(checkpoint.at(place / f"from-{found.step}", found.step))
        tensors, more = trial.run(found)
        same = tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
        step = found.step if found else 0
        if torn or not same or more != losses[step:]:
            failures.append(f"call {at}, {disk.calls[at]}: torn {torn}, resumed after {step}: {same}")
        if found is not None:
            (place / f"from-{step}").rename(place / "from-0")
    return failures


@pytest.mark.parametrize(("method", "every"), [("lora", 20), ("adalora", 50), ("full", 50)])
def test_a_few_calls(method: str, every: int, tmp_path: Path):
    assert killed(method, tmp_path, every) == []


@pytest.mark.slow
def test_every_call_with_lora(tmp_path: Path):
    assert killed("lora", tmp_path, 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in LLAMAS if method != "lora"])
def test_calls_with_every_method(method: str, tmp_path: Path):
    assert killed(method, tmp_path, 13) == []
