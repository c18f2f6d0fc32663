"""Encoded rows in files, read where they lie: memory does not grow with their number.

ids.bin    int32: the token ids of all rows, one after another
spans.bin  int32 [spans, 2]: what is trained of them, in tokens of their row
rows.bin   one record a row: where its ids and spans end, and how it was cut
"""

from __future__ import annotations

import os
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from peftctl.data.fitting import Encoded

FILES = ("ids.bin", "spans.bin", "rows.bin")

RECORD = np.dtype(
    [
        ("ids", "<i8"),
        ("spans", "<i8"),
        ("trained", "<i4"),
        ("cut", "<i4"),
        ("piece", "<i4"),
        ("pieces", "<i4"),
        ("truncated", "?"),
        ("first", "?"),
    ]
)
"""Of one row: the ends of its ids and spans in their files, its trained tokens, the fields of `Encoded`, and whether it
is the first piece of what it comes from."""

BUFFER = 1 << 20
"""Bytes of each file that are held before they are written."""


class Writer:
    """Writes rows into a folder, one after another; `close` it before they are read."""

    def __init__(self, folder: Path) -> None:
        self._ids, self._spans, self._rows = (open(folder / name, "wb", buffering=BUFFER) for name in FILES)  # noqa: SIM115
        self._ends = [0, 0]
        self.rows = 0
        """How many were written, every piece of a row for itself."""

    def write(self, pieces: Sequence[Encoded]) -> None:
        """A row as its pieces, behind those before it."""
        self.rows += len(pieces)
        for index, row in enumerate(pieces):
            self._ends[0] += len(row.ids)
            self._ends[1] += len(row.spans)
            self._ids.write(row.ids.tobytes())
            self._spans.write(array("i", [edge for span in row.spans for edge in span]).tobytes())
            record = (*self._ends, row.trained, row.cut, row.piece, row.pieces, row.truncated, index == 0)
            self._rows.write(np.array(record, dtype=RECORD).tobytes())

    def close(self) -> None:
        """Everything is on disk."""
        for file in (self._ids, self._spans, self._rows):
            file.close()


class Stored(Sequence[Encoded]):
    """Rows in the files of a folder, or some of them in another order; the files may be deleted once it is open."""

    def __init__(self, folder: Path) -> None:
        ids, spans, rows = (folder / name for name in FILES)
        self._ids, self._spans = Numbers(ids), Numbers(spans)
        self._rows: NDArray[Any] = mapped(rows, RECORD)
        self._chosen: NDArray[Any] = np.arange(len(self._rows))

    def chosen(self, numbers: Sequence[int] | NDArray[Any]) -> Stored:
        """These of its rows, in this order."""
        view = object.__new__(Stored)
        view.__dict__ |= self.__dict__ | {"_chosen": self._chosen[np.asarray(numbers, dtype=np.int64)]}
        return view

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> Encoded | Stored:
        if isinstance(index, slice):
            return self.chosen(range(len(self))[index])
        number = int(self._chosen[index])
        record = self._rows[number]
        before = self._rows[number - 1] if number else {"ids": 0, "spans": 0}
        edges = self._spans.read(2 * int(before["spans"]), 2 * int(record["spans"]))
        return Encoded(
            self._ids.read(int(before["ids"]), int(record["ids"])),
            tuple(zip(edges[::2], edges[1::2], strict=True)),
            bool(record["truncated"]),
            *(int(record[name]) for name in ("cut", "piece", "pieces")),
        )

    @property
    def lengths(self) -> NDArray[Any]:
        """Tokens of each row."""
        every = np.diff(self._rows["ids"], prepend=0)
        return np.asarray(every[self._chosen])

    @property
    def firsts(self) -> NDArray[Any]:
        """The numbers of those that are the first piece of what they come from: all, where no row was split."""
        return np.flatnonzero(self.records["first"])

    @property
    def records(self) -> NDArray[Any]:
        """What is known of each row beside its ids and spans, see `RECORD`; the ends are those in the files."""
        return np.asarray(self._rows[self._chosen])


class Numbers:
    """int32 in a file, read piece by piece: of a mapped file, whatever was looked at would count as memory in use."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, start: int, end: int) -> array[int]:
        """Those from `start` to `end`."""
        return array("i", os.pread(self._file, 4 * (end - start), 4 * start))


def mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The file as an array, not read but where it is looked at; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
