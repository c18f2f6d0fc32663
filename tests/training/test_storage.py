from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import Died, FaultyDisk, installed, lost_by_power_failure

from peftctl.errors import StorageError
from peftctl.training import filesystem, storage
from peftctl.training.storage import discard, replace_atomically, staged, sweep

DEAD = 2**22 + 1
"""A process id that no Linux gives out."""


def fill(final: Path, text: str, then: Callable[[Path], object] = lambda folder: None, **options: Any) -> None:
    """Stages a folder with one file, then does something else before it ends."""
    with staged(final, **options) as folder:
        (folder / "file").write_text(text)
        then(folder)


def fail(error: type[BaseException]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        raise error("oh")

    return act


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_staged_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    final = tmp_path / "new" / "out"
    with staged(final) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not final.exists()
    assert tree(tmp_path) == {"new": None, "new/out": None, "new/out/inner": None, "new/out/inner/file": b"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fill(tmp_path / "out", "x", fail(error))
    assert tree(tmp_path) == {}


def test_a_check_that_refuses_leaves_nothing_and_sees_all(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert (folder / "file").read_text() == "x"
        raise StorageError("no")

    with pytest.raises(StorageError, match="no"):
        fill(tmp_path / "out", "x", check=check)
    assert tree(tmp_path) == {}


def test_what_exists_is_refused_before_any_work_and_replaced_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")  # an empty folder is no result of anybody's
    with pytest.raises(StorageError, match="out: exists already"):
        fill(tmp_path / "out", "new", fail(AssertionError))
    with pytest.raises(ValueError, match="oh"):
        fill(tmp_path / "out", "new", fail(ValueError), replace=True)
    assert tree(tmp_path) == {"out": None, "out/file": b"old"}
    with staged(tmp_path / "out", replace=True) as folder:
        (folder / "other").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/other": b"new"}


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def theirs(_: Path) -> None:
        fill(tmp_path / "out2", "theirs")
        (tmp_path / "out2").rename(tmp_path / "out")

    with pytest.raises(StorageError, match="exists already"):
        fill(tmp_path / "out", "mine", theirs)
    assert tree(tmp_path) == {"out": None, "out/file": b"theirs"}


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError), staged(tmp_path / "out"):
        pass
    with staged(tmp_path / "out", replace=True) as folder:
        (folder / "file").write_text("new")
        (folder / "link").symlink_to(tmp_path / "precious")
    discard(tmp_path / "out")
    assert tree(tmp_path) == {"precious": None, "precious/file": b"x"}
    (tmp_path / f".tmp-file-{os.getpid()}").symlink_to(tmp_path / "precious" / "file")
    replace_atomically(tmp_path / "file", b"y")
    assert tree(tmp_path) == {"file": b"y", "precious": None, "precious/file": b"x"}


def test_the_callers_own_disk_errors_become_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{tmp_path}/none: does not exist"), staged(tmp_path / "out"):
        (tmp_path / "none").read_text()
    assert tree(tmp_path) == {}


def test_sweep_clears_what_the_dead_left_and_only_that(tmp_path: Path) -> None:
    keep = [f".tmp-a-{os.getppid()}", "tmp-a-1", ".tmp-a", ".cache", "a"]
    clear = [f".tmp-a-{DEAD}", f".trash-b-{DEAD}", f".old-a-{DEAD}", f".tmp-a-{os.getpid()}"]
    for name in keep + clear:
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / f".tmp-metrics.jsonl-{DEAD}").write_text("a file")
    assert [p.name for p in sweep(tmp_path, "b")] == [f".trash-b-{DEAD}"]
    assert len(sweep(tmp_path)) == len(clear)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)
    assert sweep(tmp_path / "none") == []


def test_sweep_puts_back_what_was_only_moved_aside(tmp_path: Path) -> None:
    (tmp_path / f".old-out-{DEAD}").mkdir()
    (tmp_path / f".old-out-{DEAD}" / "file").write_text("x")
    sweep(tmp_path)
    assert tree(tmp_path) == {"out": None, "out/file": b"x"}


def test_a_killed_predecessor_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".tmp-out-{os.getpid()}" / "junk").mkdir(parents=True)
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert tree(tmp_path) == {"out": None, "out/file": b"x"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "the disk failed"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EBUSY, "busy"),
    ],
)
def test_reasons_in_words(tmp_path: Path, code: int, words: str) -> None:
    with installed(FaultyDisk(at=0, error=code)), pytest.raises(StorageError, match=words) as caught:
        replace_atomically(tmp_path / "file", b"x")
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_file_system_without_folder_sync_is_fine_but_a_file_must_sync(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with installed(FaultyDisk(at=0, error=errno.EINVAL)):
        filesystem.sync(tmp_path)
    with installed(FaultyDisk(at=0, error=errno.EINVAL)), pytest.raises(StorageError):
        filesystem.sync(tmp_path / "file")


def replace_small(folder: Path) -> None:
    replace_atomically(folder / "small.json", b"new")


def replace_big(folder: Path) -> None:
    with staged(folder / "big", replace=True) as inner:
        filesystem.write(inner / "file", [b"n", b"", b"ew"])
        filesystem.new_folder(inner / "sub")
        filesystem.write(inner / "sub" / "file", [b"new"])


def replace_all(folder: Path) -> None:
    """Everything that storage can do, over an older folder and file."""
    replace_small(folder)
    replace_big(folder)
    discard(folder / "gone")


def older(folder: Path) -> Path:
    folder.mkdir()
    (folder / "small.json").write_bytes(b"old")
    for name in ("big", "gone"):
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "file").write_bytes(b"old")
        (folder / name / "sub" / "file").write_bytes(b"old")
    return folder


def whole(folder: Path) -> bool:
    """Each of the three is the old or the new one, and nothing else is there."""
    facts = [
        (folder / "small.json").read_bytes() in (b"old", b"new"),
        (folder / "big/file").read_bytes() == (folder / "big/sub/file").read_bytes(),
        not (folder / "gone").exists() or (folder / "gone/sub/file").read_bytes() == b"old",
        {path.name for path in folder.iterdir()} <= {"small.json", "big", "gone"},
    ]
    return all(facts)


def test_killed_at_every_call_it_is_the_old_or_the_new(tmp_path: Path) -> None:
    with installed(FaultyDisk()) as disk:
        replace_all(older(tmp_path / "whole"))
    assert len(disk.calls) > 25
    for at in range(len(disk.calls)):
        folder = older(tmp_path / str(at))
        with installed(FaultyDisk(at=at)), pytest.raises(Died):
            replace_all(folder)
        sweep(folder)
        assert whole(folder), disk.calls[at]


def test_refused_at_every_call_it_says_so_and_is_the_old_or_the_new(tmp_path: Path) -> None:
    with installed(FaultyDisk()) as disk:
        replace_all(older(tmp_path / "whole"))
    for at in range(len(disk.calls)):
        folder = older(tmp_path / str(at))
        with installed(FaultyDisk(at=at, error=errno.ENOSPC)), pytest.raises(StorageError, match="no space left"):
            replace_all(folder)
        sweep(folder)
        assert whole(folder), disk.calls[at]


def test_short_writes_lose_nothing(tmp_path: Path) -> None:
    data = bytes(range(256))
    with installed(FaultyDisk(short=True)):
        assert filesystem.write(tmp_path / "file", [data, b"", memoryview(data)]).size == 512
    assert (tmp_path / "file").read_bytes() == data + data


@pytest.mark.parametrize("act", [replace_small, replace_big, lambda folder: discard(folder / "gone")])
def test_every_sync_is_there_and_each_is_needed(tmp_path: Path, act: Callable[[Path], None]) -> None:
    with installed(FaultyDisk()) as disk:
        act(older(tmp_path / "all"))
    assert lost_by_power_failure(disk.calls) == []
    assert disk.syncs >= 1
    for forget in range(disk.syncs):
        with installed(FaultyDisk(forget=forget)) as cheat:
            act(older(tmp_path / str(forget)))
        assert lost_by_power_failure(cheat.calls), f"sync {forget} is not needed"


def test_another_live_process_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / f".tmp-out-{os.getppid()}"
    theirs.mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert theirs.exists()
    assert storage.sweep(tmp_path) == []
