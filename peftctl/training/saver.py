"""When a checkpoint cannot be written: the older ones stay, training goes on, and the next one is another try."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from peftctl.errors import StorageError

TRIES = 3
"""Saves in a row that may fail before the run ends."""
COPIES = 4
"""Times a checkpoint holds what is trained: the adapter, the exact tensors, and two moments of them."""


class Saver:
    """Commits checkpoints, and says what came of it."""

    def __init__(self, log: Callable[[dict[str, Any]], None]) -> None:
        self._log = log
        self._failed = 0

    def save(self, step: int, commit: Callable[[], Path], prune: Callable[[], object]) -> bool:
        """Whether `commit` has brought the state after `step` to the disk; then `prune` deletes older ones.

        Both raise StorageError when the disk refuses, and leave what was there. So does this when `commit` has been
        refused three times in a row.
        """
        try:
            path = commit()
        except StorageError as error:
            self._failed += 1
            [(text, hint), *_] = error.problems
            if self._failed == TRIES:
                what = f"step {step}: no checkpoint could be written, {TRIES} times in a row: {text}"
                raise StorageError(f"{what}; the ones before are as they were", hint) from error
            self._warn(f"step {step}: no checkpoint: {text}; the ones before are as they were, the next is tried", hint)
            return False
        self._failed = 0
        self._log({"event": "saved", "step": step, "path": str(path)})
        try:
            prune()
        except StorageError as error:
            [(text, hint), *_] = error.problems
            self._warn(f"older checkpoints stay: {text}", hint)
        return True

    def _warn(self, text: str, hint: str | None) -> None:
        self._log({"event": "warning", "text": text, "hint": hint})


def short_of_room(folder: Path, trained: Iterable[Tensor], keep: int) -> str | None:
    """That the disk of `folder` has no room for `keep` checkpoints, the best one and the one being written."""
    needed = (keep + 2) * COPIES * sum(tensor.numel() * tensor.element_size() for tensor in trained)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free >= needed:
        return None
    unit, name = (2**30, "GiB") if needed >= 2**30 else (2**20, "MiB")
    return f"{folder}: {free / unit:.1f} {name} are free, and checkpoints may need {needed / unit:.1f}"
