"""No loss of power, death or damage costs a committed checkpoint; without any one safeguard, some would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import writer_checks
from faulty_disk import FaultyDisk, installed
from toy_run import Run
from writer_checks import corruptions, kills, life, power_losses, small_files

from peftctl.errors import StorageError
from peftctl.training import checkpoint, filesystem, manifest, storage


def test_losses_of_power(tmp_path: Path):
    assert list(power_losses(tmp_path / "a", 1000, seed=1)) == []
    assert list(small_files(tmp_path / "b", 3000, seed=1)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_losses_of_power(tmp_path: Path):
    assert list(power_losses(tmp_path, 20_000, seed=int(time.time()))) == []


def test_corruptions(tmp_path: Path):
    assert list(corruptions(tmp_path, 1000, seed=1)) == []


@pytest.mark.slow
def test_many_corruptions(tmp_path: Path):
    assert list(corruptions(tmp_path, 10_000, seed=int(time.time()))) == []


def test_death_at_every_call(tmp_path: Path):
    assert list(kills(tmp_path)) == []


@pytest.mark.slow
def test_every_sync_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer_checks, "LIFE", (1, 1, 1))
    (tmp_path / "counted").mkdir()
    with installed(FaultyDisk()) as disk:
        life(Run(tmp_path / "counted" / "checkpoints", "sgd_plain"))
    assert disk.syncs == 32
    lost = {at: next(power_losses(tmp_path / str(at), 800, seed=1, forget=at), None) for at in range(disk.syncs)}
    assert [at for at, what in lost.items() if what is None] == []


def no_rename(patch: pytest.MonkeyPatch) -> None:
    own = storage._beside
    patch.setattr(storage, "_beside", lambda path, kind: own(path, kind) if kind != "tmp" else path)
    patch.setattr(storage, "_move_in", lambda folder, final, replace: None)


def no_hashes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifest, "_digest", lambda path: filesystem.Written(path.stat().st_size, ""))


def no_manifest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifest, "verify", lambda folder: None)


def no_rng(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint.Checkpoint, "restore_rng", lambda self, rank=0: True)


def no_trash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "discard", filesystem.remove)


def deletes_first(patch: pytest.MonkeyPatch) -> None:
    """What is to be replaced goes before its successor is there."""
    own = storage._move_in

    def move_in(folder: Path, final: Path, replace: bool) -> None:
        filesystem.remove(final)
        own(folder, final, replace)

    patch.setattr(storage, "_move_in", move_in)


def keeps_one(patch: pytest.MonkeyPatch) -> None:
    own = checkpoint.prune

    def prune(folder: Path, keep: int, best: int | None = None) -> None:
        own(folder, keep, best)
        for _, path in checkpoint._steps(folder)[:-1]:
            storage.discard(path)

    patch.setattr(checkpoint, "prune", prune)


@pytest.mark.parametrize(
    ("safeguard", "check"),
    [
        (no_rename, kills),
        (no_hashes, lambda place: corruptions(place, 300, seed=1)),
        (no_manifest, lambda place: corruptions(place, 300, seed=1)),
        (no_rng, kills),
        (no_trash, kills),
        (deletes_first, kills),
        (keeps_one, lambda place: power_losses(place, 500, seed=1)),
    ],
)
def test_without_a_safeguard_something_is_lost(
    safeguard: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Path], Iterator[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    safeguard(monkeypatch)
    try:
        lost = next(check(tmp_path), None)
    except StorageError as error:  # what was left is in the way of the next save
        lost = str(error)
    assert lost
