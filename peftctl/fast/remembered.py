"""What comes out of the layers below the first that is trained: it stays as it is, so it is computed once.

Kept row by row in a file without a name, which is gone with the process. Each row is computed beside the same others
whatever the order of training, so that a run that goes on reads what the uninterrupted one read, bit for bit.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftctl.config.home import cache_home

LIMIT = 32 << 30
"""Most bytes that are kept; never more than half of what the disk has left."""


class Remembered:
    """Hidden states [tokens, width] of rows, by the ids of their tokens."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.file: Any = None
        self.width, self.dtype = width, dtype
        self.places: dict[bytes, int] = {}
        self.end = 0

    def room(self, tokens: int) -> bool:
        """Whether those of so many tokens can be kept."""
        size = tokens * self.width * self.dtype.itemsize
        return size <= min(LIMIT, shutil.disk_usage(folder()).free // 2)

    def keep(self, ids: Tensor, hidden: Tensor) -> None:
        """Write those of one row down."""
        if self.file is None:
            self.file = tempfile.TemporaryFile(dir=folder(), prefix="hidden-")  # noqa: SIM115
        raw = hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        self.file.write(raw)
        self.places[key(ids)] = self.end
        self.end += len(raw)

    def find(self, ids: Tensor) -> Tensor | None:
        """Those of one row; None where they were not kept."""
        place = self.places.get(key(ids))
        if place is None:
            return None
        size = len(ids) * self.width * self.dtype.itemsize
        self.file.seek(place)
        return torch.frombuffer(bytearray(self.file.read(size)), dtype=self.dtype).view(len(ids), self.width)

    def close(self) -> None:
        """Let go of the file."""
        if self.file is not None:
            self.file.close()


def folder() -> Path:
    """Where the file lies, made if need be."""
    found = cache_home()
    found.mkdir(parents=True, exist_ok=True)
    return found


def key(ids: Tensor) -> bytes:
    """What stands for a row."""
    return ids.cpu().numpy().tobytes()
