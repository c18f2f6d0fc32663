"""The self-test finds nothing wrong with this disk, and finds what is broken on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftctl.errors import StorageError
from peftctl.training import checkpoint, storage
from peftctl.verbs.selftest import selftest


def test_a_few_kills(cli: Callable[..., SimpleNamespace], tmp_path: Path):
    done = cli("selftest", "--kills", 6, "--folder", tmp_path, "--seed", 1, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["kills"] == 6
    assert found["runs"] == found["exact"] > 0
    assert found["lost"] == found["damaged"] == 0
    assert found["most_steps_lost"] <= found["save_every"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_many_kills(tmp_path: Path):
    found = selftest(60, folder=tmp_path)
    assert found["runs"] == found["exact"] > 6


def forget_rng(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint.Checkpoint, "restore_rng", lambda self, rank=0: torch.manual_seed(rank))


def lose_checkpoints(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "prune", lambda folder, keep, best=None: shutil.rmtree(folder))


def write_in_place(patch: pytest.MonkeyPatch) -> None:
    """Give what is written its name first."""
    own = storage._beside
    patch.setattr(storage, "_beside", lambda path, kind: own(path, kind) if kind != "tmp" else path)
    patch.setattr(storage, "_move_in", lambda folder, final, replace: None)


@pytest.mark.parametrize(
    ("broken", "told", "kills"),
    [
        (forget_rng, "exact", 5),
        (lose_checkpoints, "checkpoints lost", 5),
        pytest.param(write_in_place, "damaged", 30, marks=pytest.mark.slow),
    ],
)
def test_what_is_broken_is_found(
    broken: Callable[[Any], None], told: str, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken(monkeypatch)
    with pytest.raises(StorageError, match="do not trust this disk") as caught:
        selftest(kills, folder=tmp_path, seed=3)
    text = str(caught.value)
    lost, damaged = (int(text.split(f" {word}")[0].split()[-1]) for word in ("checkpoints lost", "damaged"))
    exact, runs = text.split(" exact")[0].split()[-3::2]
    assert {"exact": exact != runs, "checkpoints lost": lost > 0, "damaged": damaged > 0}[told], text
    assert [path for path in tmp_path.iterdir() if path.name.startswith("peftctl-selftest-")]  # to look at
