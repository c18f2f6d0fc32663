"""The rows of a set as they were read: read anew when they are asked for, so that they need no memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from peftctl.data.dataset import Dataset, Sources
from peftctl.data.examples import examples
from peftctl.data.formats import Example, Format
from peftctl.data.reading import Accept
from peftctl.data.sources import listed
from peftctl.data.supervised import supervised
from peftctl.errors import DataError

CHANGED = ("rows are missing: the data changed while it was read", "start again")


class Texts(Sequence[Example]):
    """The rows of `spec`, all of which were kept, or some of them in their order.

    Those that were loaded stay in memory. Raises DataError when the files have changed so much that rows are missing.
    """

    def __init__(
        self,
        spec: Sources,
        formats: Sequence[Format],
        dataset: Dataset,
        root: Path,
        rows: int,
        accept: Accept = supervised,
    ) -> None:
        self._sources = list(zip(listed(spec), formats, strict=True))
        self._dataset, self._root, self._accept = dataset, root, accept
        self._chosen: NDArray[np.int64] = np.arange(rows)
        self._known: dict[int, Example] = {}

    def chosen(self, numbers: Sequence[int] | NDArray[np.int64]) -> Texts:
        """These of its rows; `numbers` ascend."""
        view = object.__new__(Texts)
        view.__dict__ |= self.__dict__ | {"_chosen": self._chosen[np.asarray(numbers, dtype=np.int64)]}
        return view

    def load(self, numbers: Iterable[int]) -> None:
        """Reads these rows, in one pass for those that are not known yet."""
        missing = {int(self._chosen[number]) for number in numbers} - self._known.keys()
        if missing:
            last = max(missing)
            for number, row in enumerate(self._read()):
                if number in missing:
                    self._known[number] = row
                if number == last:
                    return
            raise DataError(*CHANGED)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> Example | Texts:
        if isinstance(index, slice):
            return self.chosen(range(len(self))[index])
        self.load([index])
        return self._known[int(self._chosen[index])]

    def __iter__(self) -> Iterator[Example]:
        rows = enumerate(self._read())
        for wanted in self._chosen:
            row = next((row for number, row in rows if number == wanted), None)
            if row is None:
                raise DataError(*CHANGED)
            yield row

    def _read(self) -> Iterator[Example]:
        for source, format in self._sources:
            for item in examples(source, format, self._dataset, self._root, accept=self._accept):
                if not isinstance(item, DataError):
                    yield item
