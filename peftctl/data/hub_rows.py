"""Data sets of the hub, through `datasets`: a place is `id[split]:row`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

from peftctl.data.dataset import Source
from peftctl.data.file import Digest, Row
from peftctl.data.parquet_rows import without_nulls
from peftctl.errors import DataError


def records(source: Source, hint: str | None, digest: Digest | None) -> Iterator[Row]:
    """The rows of a hub data set, without what is null; `datasets` keeps them in its own cache.

    `hint` is what else `path` may have meant. Raises DataError when the data set cannot be loaded or has no rows.
    """
    name = f"{source.path}[{source.split}]"
    asked = (source.path, source.subset, source.split, source.max_rows if source.streaming else None)
    number = 0
    try:
        for number, value in enumerate(_loaded(*asked), start=1):
            row = without_nulls(value)
            if digest is not None:
                digest(json.dumps(row, sort_keys=True, default=str).encode())
            yield Row(f"{name}:{number}", row)
    except Exception as error:  # the library raises whatever its own libraries raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        what = f"{name}: cannot be read after row {number}"
        if not number:
            what = f"{source.path}: no such file, and the hub data set cannot be loaded"
        hint = hint or "check the id, `split` and `subset`, and that the hub can be reached"
        raise DataError(f"{what}: {first}", hint) from None
    if not number:
        raise DataError(f"{name}: no rows")


@lru_cache(maxsize=8)
def _loaded(path: str, subset: str | None, split: str, head: int | None) -> Iterable[dict[str, Any]]:
    """A data set, or its first `head` rows by streaming."""
    # Rows are read more than once; asking the hub more than once would take seconds each time.
    import datasets

    if head is not None:
        return list(islice(datasets.load_dataset(path, name=subset, split=split, streaming=True), head))
    rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, name=subset, split=split)
    return rows
