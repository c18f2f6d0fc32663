"""An `os` for `peftctl.training.filesystem` that records its calls and dies, fails or cheats at one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peftctl.training import filesystem


class Died(BaseException):
    """The process is gone: nothing that it would still do happens."""


class FaultyDisk:
    """Passes everything on to `os`. At call number `at` it dies (half of a write done), or raises `error` once.

    `short` takes at most 7 bytes a write; `forget` skips the sync with that number. Syncs are recorded, not made: the
    page cache survives the death of a process.
    """

    def __init__(
        self, *, at: int | None = None, error: int | None = None, short: bool = False, forget: int | None = None
    ) -> None:
        self.calls: list[tuple[str, Path, Path | None]] = []
        self._at, self._error, self._short, self._forget = at, error, short, forget
        self._paths: dict[int, Path] = {}
        self._syncs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _call(self, name: str, path: Path, new: Path | None = None) -> bool:
        """Whether this very call is the one at which the process dies."""
        self.calls.append((name, path, new))
        if self._at is None or len(self.calls) <= self._at:
            return False
        if self._error is not None:
            if len(self.calls) == self._at + 1:
                raise OSError(self._error, os.strerror(self._error), str(path))
            return False
        if len(self.calls) == self._at + 1 and name == "write":
            return True
        raise Died

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._call("create", path)
        file = os.open(path, flags, mode)
        self._paths[file] = Path(path)
        return file

    def write(self, file: int, data: memoryview) -> int:
        if self._call("write", self._paths[file]):
            os.write(file, data[: len(data) // 2])
            raise Died
        return os.write(file, data[:7] if self._short else data)

    def fsync(self, file: int) -> None:
        self._syncs += 1
        if self._syncs - 1 != self._forget:
            self._call("fsync", self._paths[file])

    def rename(self, old: Path, new: Path) -> None:
        self._call("rename", Path(old), Path(new))
        os.rename(old, new)

    def mkdir(self, path: Path) -> None:
        self._call("mkdir", path)
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        self._call("unlink", path)
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        self._call("rmdir", path)
        os.rmdir(path)

    @property
    def syncs(self) -> int:
        return self._syncs


@contextmanager
def installed(disk: FaultyDisk) -> Iterator[FaultyDisk]:
    """Everything that peftctl writes goes through `disk` for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem, "os", disk)
        yield disk


def lost_by_power_failure(calls: list[tuple[str, Path, Path | None]]) -> list[str]:
    """What a loss of power at the wrong moment would break, judged by the order of the calls alone."""
    dirty: set[Path] = set()  # files with bytes, folders with names, that no sync has covered
    found = []
    for name, path, new in calls:
        if name == "write":
            dirty.add(path)
        elif name == "fsync":
            dirty.discard(path)
        elif name == "rename":
            assert new is not None
            inside = [item for item in dirty if item == path or path in item.parents]
            found += [f"{item} not synced before it was renamed" for item in inside]
            dirty = {item for item in dirty if item not in inside} | {path.parent}
        elif name in ("create", "mkdir"):
            dirty |= {path.parent, path} if name == "mkdir" else {path.parent}
        elif path.parent.name.startswith((".trash-", ".old-")) and path.parent.parent in dirty:
            found.append(f"{path} removed before {path.parent.parent} was synced")
    return found + [f"{path} never synced" for path in sorted(dirty)]
