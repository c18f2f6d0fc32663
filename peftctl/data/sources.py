"""What `dataset.train` and `dataset.eval` name: files, folders, globs and hub ids, read as one stream of rows.

A kind of file is one reader and one entry of READERS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

from peftctl.config.home import expanded
from peftctl.data import csv_rows, hub_rows, json_rows, parquet_rows, picture_rows, text_rows
from peftctl.data.dataset import Source, Sources
from peftctl.data.file import Digest, File, Row
from peftctl.data.formats.image_text import ENDINGS as PICTURES
from peftctl.errors import DataError, Problem

READERS: dict[str, Callable[[File, Source], Iterator[Row | Problem]]] = {
    ".jsonl": lambda file, source: json_rows.lines(file),
    ".json": lambda file, source: json_rows.elements(file),
    ".csv": lambda file, source: csv_rows.records(file, ","),
    ".tsv": lambda file, source: csv_rows.records(file, "\t"),
    ".parquet": lambda file, source: parquet_rows.records(file),
    ".txt": lambda file, source: text_rows.samples(file, source.sample_by),
    ".md": lambda file, source: text_rows.samples(file, source.sample_by),
    "picture": lambda file, source: picture_rows.record(file),
}
TEXTS = (".txt", ".md")
"""The kinds that `sample_by` says something about."""

ROWS = tuple(suffix for suffix in READERS if suffix.startswith("."))
PACKED = tuple(f"{suffix}.gz" for suffix in ROWS if suffix != ".parquet")
SUFFIXES = (*ROWS, *PACKED)
"""Endings of the files of rows that are read."""

FILES = (*SUFFIXES, *PICTURES, ".arrow", ".bz2", ".gz", ".xlsx", ".xz", ".yaml", ".yml", ".zip", ".zst")
"""Endings that no hub id has: such a text is a path even when nothing is there."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NO_ROWS = re.compile(r"\.|(readme|licen[cs]e)\b", re.IGNORECASE)
"""Names of files in a folder of rows that are none: hidden ones, as a glob passes over, and what tells of the rows."""

_KINDS = ", ".join(f"`{suffix}`" for suffix in ROWS)


def listed(spec: Sources) -> list[Source]:
    """Every source of a recipe's `train` or `eval`, in order."""
    parts = spec if isinstance(spec, list) else [spec]
    return [part if isinstance(part, Source) else Source(path=part) for part in parts]


def read(source: Source, root: Path, digest: Digest | None = None) -> Iterator[Row | Problem]:
    """The rows of one source, and in their places the mistakes of single rows.

    `root` is where relative paths start: the recipe's folder. `digest` is fed the bytes that are read, unpacked; for a
    hub data set, its rows as JSON. Raises DataError when the source as a whole cannot be used.
    """
    found = files(source.path, root)
    rows: Iterator[Row | Problem]
    if found is None:
        rows = hub_rows.records(source, near(source.path, root), digest)
    else:
        _refuse_what_files_lack(source, found)
        rows = (row for path, name in found for row in read_file(File(path, name, digest), source))
    yield from islice(rows, source.max_rows)


def read_file(file: File, source: Source) -> Iterator[Row | Problem]:
    """The rows of one file of `source`. Raises DataError when the file as a whole cannot be used, or has no rows."""
    rows = READERS[kind(file.name)](file, source)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file.name}: no rows in the file")
    yield first
    yield from rows


def kind(name: str) -> str:
    """The key of READERS for a file. Raises DataError when there is none."""
    if name.lower().endswith(PICTURES):
        return "picture"
    if not name.lower().endswith(SUFFIXES):
        raise DataError(f"{name}: cannot read this kind of file", f"rows come from {_KINDS}, most also as `.gz`")
    return Path(name.lower().removesuffix(".gz")).suffix


def files(text: str, root: Path) -> list[tuple[Path, str]] | None:
    """Path and name of each file that `text` means, in the order of their names; None when it is a hub id.

    Raises DataError when there is none, or one that cannot be read, or several kinds of them.
    """
    try:
        found = _found(text, root)
    except OSError as error:
        raise DataError(f"{text}: cannot be read: {error.strerror or error}") from None
    kinds = sorted({kind(name) for _, name in found or ()})
    if len(kinds) > 1:
        first = f"{text.rstrip('/')}/*{kinds[0]}" if (root / text).is_dir() else f"*{kinds[0]}"
        mixed = ", ".join(f"`{suffix}`" for suffix in kinds)
        raise DataError(f"{text}: several kinds of files ({mixed})", f"name one kind in each source, such as `{first}`")
    return found


def _found(text: str, root: Path) -> list[tuple[Path, str]] | None:
    path = root / expanded(text)
    if path.is_dir():
        every = sorted(item.name for item in path.iterdir() if item.is_file() and not _NO_ROWS.match(item.name))
        names = [name for name in every if name.lower().endswith(SUFFIXES)]
        pictures = [name for name in every if name.lower().endswith(PICTURES)]
        if pictures and all(kind(name) in TEXTS for name in names):  # what other files say of pictures counts more
            names = pictures
        if not names:
            hint = f"`{text.rstrip('/')}/**/*.jsonl` also looks below it"
            raise DataError(f"{text}: no file of rows in this folder ({_KINDS})", hint)
        return [(path / name, f"{text.rstrip('/')}/{name}") for name in names]
    if path.exists():
        if not path.is_file():
            raise DataError(f"{text}: not a file")
        return [(path, text)]
    if has_magic(text):
        names = sorted(glob(str(expanded(text)), root_dir=root, recursive=True))
        found = [(root / name, name) for name in names if (root / name).is_file()]
        if not found:
            raise DataError(f"{text}: no file matches")
        return found
    if text.lower().endswith(FILES) or not _HUB_ID.fullmatch(text):
        raise DataError(f"{text}: no such file or folder in `{root}`, and not a hub id either", near(text, root))
    return None


def _refuse_what_files_lack(source: Source, found: list[tuple[Path, str]]) -> None:
    """Options that would say nothing about these files are mistakes."""
    of_hub = {"split": source.split != "train", "subset": source.subset is not None, "streaming": source.streaming}
    problems = [
        Problem(f"{source.path}: `{name}` is for hub data sets, and this is here", f"leave `{name}` out")
        for name, said in of_hub.items()
        if said
    ]
    if source.sample_by != "document" and kind(found[0][1]) not in TEXTS:
        problems.append(Problem(f"{source.path}: `sample_by` is for plain text", "leave `sample_by` out"))
    if problems:
        raise DataError.of(problems)


def near(text: str, root: Path) -> str | None:
    """A hint that mends the first part of the path `text` that does not exist below `root`, when something is near."""
    path = expanded(text)
    while path.name and not (root / path.parent).exists():
        path = path.parent
    parent = root / path.parent
    close = get_close_matches(path.name, [item.name for item in parent.iterdir()], n=1) if parent.is_dir() else []
    return f"did you mean `{path.parent / close[0]}`?" if close else None
