from __future__ import annotations

import errno
import resource
import shutil
import signal
from pathlib import Path

import pytest
from faulty_disk import Died, FaultyDisk, installed, lost_by_power_failure
from toy_run import Run, steps_in

from peftctl.errors import StorageError
from peftctl.training import checkpoint
from peftctl.verbs.mortal import live


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 9 and 10."""
    run = Run(tmp_path / "two")
    for steps in (9, 1):
        run.train(steps)
        run.save()
    return run.folder


def life(folder: Path, committed: list[int]) -> None:
    """Three saves, one of them again, and a prune after each; `committed` learns what must never be lost."""
    run = Run(folder)
    for steps in (1, 1, 1, 0):
        run.train(steps)
        run.save()
        committed.append(run.step)
        checkpoint.prune(folder, 2, best=None)


def test_killed_at_every_call_a_verified_checkpoint_is_found(tmp_path: Path) -> None:
    with installed(FaultyDisk()) as disk:
        life(tmp_path / "whole", [])
    after = {}  # what a run that is never stopped holds at each step
    whole = Run(tmp_path / "none")
    for _ in range(4):
        whole.train(1)
        after[whole.step] = whole.digest()
    assert len(disk.calls) > 150
    for at in range(len(disk.calls)):
        folder, committed = tmp_path / str(at), []
        with installed(FaultyDisk(at=at)), pytest.raises(Died):
            life(folder, committed)
        found, skipped = checkpoint.latest(folder)
        assert skipped == [], disk.calls[at]  # thanks to the rename there is never a torn one
        assert (found.step if found else 0) >= max(committed, default=0)
        if found is None:
            continue
        assert len(steps_in(folder)) >= min(2, found.step)
        resumed = Run(folder, seed=1)
        resumed.resume()
        assert resumed.digest() == after[found.step]
        resumed.train(1)
        assert resumed.digest() == after[found.step + 1]
        shutil.rmtree(folder)


CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EMFILE, errno.EFBIG, errno.EROFS]


@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
def test_refused_at_every_call_the_old_ones_stay_and_the_next_save_works(copy: Path, code: int) -> None:
    run = Run(copy, seed=1)
    run.resume()
    run.train(1)
    with installed(FaultyDisk()) as disk:
        run.save()
    shutil.rmtree(copy / "step-000011")
    for at in range(len(disk.calls)):
        with installed(FaultyDisk(at=at, error=code)), pytest.raises(StorageError, match=str(copy)) as caught:
            run.save()
        assert caught.value.problems[0].hint
        found, skipped = checkpoint.latest(copy)
        assert found is not None
        assert skipped == []
        assert {9, 10} <= set(steps_in(copy)) <= {9, 10, 11}  # and no temporary folder among them
        if found.step == 11:
            shutil.rmtree(found.path)
    run.save()
    assert checkpoint.load(copy / "step-000011").step == 11


def test_a_disk_that_lies_is_caught_before_the_rename(copy: Path) -> None:
    class Lying(FaultyDisk):
        def write(self, file: int, data: memoryview) -> int:
            if self._paths[file].name == "optimizer.safetensors":
                data = memoryview(bytes(data[:-1]) + b"\x5a")
            return super().write(file, data)

    run = Run(copy, seed=1)
    run.resume()
    run.train(1)
    with installed(Lying()), pytest.raises(StorageError, match=r"optimizer\.safetensors` is not what was written"):
        run.save()
    assert steps_in(copy) == [9, 10]


def test_short_writes_lose_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "sgd_plain")
    with installed(FaultyDisk(short=True)):
        run.save()
    checkpoint.load(tmp_path / "step-000000")


def test_a_file_may_not_grow_any_further(tmp_path: Path) -> None:
    """The limit of a real process, as `ulimit -f` sets it."""
    run = Run(tmp_path)
    run.save()
    run.train(1)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(StorageError, match="larger than a file may be here") as caught:
            run.save()
        assert "ulimit -f" in str(caught.value)

    log = tmp_path.with_name("log")
    assert live(limited, log) == 0, log.read_text()
    assert steps_in(tmp_path) == [0]
    checkpoint.load(tmp_path / "step-000000")


def test_every_sync_of_a_save_is_there_and_each_is_needed(tmp_path: Path) -> None:
    def saved(folder: Path, disk: FaultyDisk) -> FaultyDisk:
        folder.mkdir()
        run = Run(folder)
        with installed(disk):
            run.save()
        return disk

    disk = saved(tmp_path / "all", FaultyDisk())
    assert lost_by_power_failure(disk.calls) == []
    assert disk.syncs == 7 + 3  # the files, `adapter`, the checkpoint, and the folder above it
    for forget in range(disk.syncs):
        cheat = saved(tmp_path / str(forget), FaultyDisk(forget=forget))
        assert lost_by_power_failure(cheat.calls), f"sync {forget} is not needed"
