"""What `dataset.train` and `dataset.eval` name: files, folders, globs and hub ids, read as one stream of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import lru_cache
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from peftctl.data.dataset import Source, Sources
from peftctl.data.json_rows import Digest, Row, read_file
from peftctl.errors import DataError, Problem

SUFFIXES = (".jsonl", ".json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|ya?ml|gz|zst|zip)$", re.IGNORECASE)


def listed(spec: Sources) -> list[Source]:
    """Every source of a recipe's `train` or `eval`, in order."""
    parts = spec if isinstance(spec, list) else [spec]
    return [part if isinstance(part, Source) else Source(path=part) for part in parts]


def read(source: Source, root: Path, digest: Digest = lambda data: None) -> Iterator[Row | Problem]:
    """The rows of one source, and in their places the mistakes of single rows.

    `root` is where relative paths start: the recipe's folder. `digest` is fed the bytes that are read; for a hub data
    set, its rows as JSON. Raises DataError when the source as a whole cannot be used.
    """
    try:
        files = _files(source.path, root)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read: {error.strerror or error}") from None
    if files is None:
        yield from _hub(source, root, digest)
        return
    for path, name in files:
        yield from read_file(path, name, digest)


def _files(text: str, root: Path) -> list[tuple[Path, str]] | None:
    """Path and name of each file that `text` means, in the order of their names; None when it is a hub id."""
    path = root / Path(text).expanduser()
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file())
        if not names:
            raise DataError(f"{text}: no `.jsonl` or `.json` file in this folder", "`**/*.jsonl` also looks below it")
        return [(path / name, f"{text.rstrip('/')}/{name}") for name in names]
    if path.exists():
        return [(path, _readable(text))]
    if has_magic(text):
        names = sorted(glob(str(Path(text).expanduser()), root_dir=root, recursive=True))
        found = [(root / name, _readable(name)) for name in names if (root / name).is_file()]
        if not found:
            raise DataError(f"{text}: no file matches")
        return found
    if _FILE_SUFFIX.search(text) or not _HUB_ID.fullmatch(text):
        raise DataError(f"{text}: no such file or folder in `{root}`, and not a hub id either", near(text, root))
    return None


def _readable(name: str) -> str:
    if not name.lower().endswith(SUFFIXES):
        hint = "rows come from JSON Lines (`.jsonl`) or a JSON list (`.json`)"
        raise DataError(f"{name}: cannot read this kind of file", hint)
    return name


def near(text: str, root: Path) -> str | None:
    """A hint that mends the first part of the path `text` that does not exist below `root`, when something is near."""
    path = Path(text).expanduser()
    while path.name and not (root / path.parent).exists():
        path = path.parent
    parent = root / path.parent
    close = get_close_matches(path.name, [item.name for item in parent.iterdir()], n=1) if parent.is_dir() else []
    return f"did you mean `{path.parent / close[0]}`?" if close else None


def _hub(source: Source, root: Path, digest: Digest) -> Iterator[Row | Problem]:
    """Rows of a hub data set; `datasets` keeps them in its own cache."""
    name = f"{source.path}[{source.split}]"
    try:
        rows = _loaded(source.path, source.subset, source.split)
    except Exception as error:  # the library raises whatever its own libraries raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = near(source.path, root) or "check the id, `split` and `subset`, and that the hub can be reached"
        text = f"{source.path}: no such file, and the hub data set cannot be loaded: {lines[0][:200]}"
        raise DataError(text, hint) from None
    number = 0
    for number, value in enumerate(rows, start=1):
        # Columns that a row leaves out come back as None.
        row = {key: item for key, item in value.items() if item is not None}
        digest(json.dumps(row, sort_keys=True, default=str).encode())
        yield Row(f"{name}:{number}", row)
    if not number:
        raise DataError(f"{name}: no rows")


@lru_cache(maxsize=8)
def _loaded(path: str, subset: str | None, split: str) -> Iterable[dict[str, Any]]:
    # Rows are read more than once; asking the hub more than once would take seconds each time.
    import datasets

    rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, name=subset, split=split)
    return rows
