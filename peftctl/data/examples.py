"""The rows of a source as examples: what they are, with their columns mapped, each mistake in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from peftctl.data.dataset import Dataset, Source, Sources
from peftctl.data.file import Digest, Row
from peftctl.data.formats import Captioned, Example, Format, check, guess
from peftctl.data.formats.columns import absent, mapped
from peftctl.data.mistakes import Mistakes
from peftctl.data.pictures import located
from peftctl.data.reading import Accept
from peftctl.data.sources import listed, read
from peftctl.data.supervised import supervised
from peftctl.errors import DataError, Problem

HEAD = 20
"""Rows that a format is guessed from."""


def format_of(
    source: Source, dataset: Dataset, root: Path, say: Callable[[str], None], mistakes: Mistakes
) -> Format | None:
    """What the rows of a source are, named or guessed and told; None when no row tells, and `mistakes` says why.

    Raises DataError when `columns` names what the first rows do not have.
    """
    format = source.format or (None if dataset.format == "auto" else dataset.format)
    columns = columns_of(source, dataset)
    if format is not None and not columns:
        return format
    met, head, rest = Mistakes(), list[Row](), read(source, root)
    for item in rest:
        if isinstance(item, Problem):
            met.add([item])
        else:
            head.append(item)
        if len(head) == HEAD:
            break
    if head and (problems := absent(head, columns, source.path)):
        raise DataError.of(problems)
    if format is not None:
        return format
    format = _guessed([mapped(row, columns) for row in head], columns, met)
    for item in rest if format is None else ():  # the first rows may all be bad ones
        if isinstance(item, Problem):
            met.add([item])
        elif (format := _guessed([mapped(item, columns)], columns, met)) is not None:
            break
    if format is None:
        mistakes.add(met.problems, met.more, met.rows)
        return None
    say(f"{source.path}: rows are `{format}`, guessed from their keys")
    return format


def _guessed(rows: list[Row], columns: dict[str, str], mistakes: Mistakes) -> Format | None:
    try:
        return guess(rows, columns) if rows else None
    except DataError as error:
        for problem in error.problems:
            mistakes.add([problem])
        return None


def examples(
    source: Source,
    format: Format,
    dataset: Dataset,
    root: Path,
    digest: Digest | None = None,
    accept: Accept = supervised,
) -> Iterator[Example | DataError]:
    """The rows of a source as they are trained, and in their places what is wrong with those that cannot be.

    Raises what `accept` raises: DataError when the source is of a form that the task makes nothing of.
    """
    columns = columns_of(source, dataset)
    for item in read(source, root, digest):
        if isinstance(item, Problem):
            yield DataError.of([item])
            continue
        try:
            example = check(mapped(item, columns), format)
            if isinstance(example, Captioned):
                example = located(example, root, digest)
        except DataError as error:
            yield error
            continue
        yield accept(example)


def readable(
    spec: Sources, dataset: Dataset, root: Path, accept: Accept = lambda example: example
) -> Iterator[Example]:
    """The rows of `spec` that can be read; what is wrong with the others is told where they are prepared."""
    for source in listed(spec):
        with suppress(DataError):
            format = format_of(source, dataset, root, lambda line: None, Mistakes())
            found = examples(source, format, dataset, root, accept=accept) if format else ()
            yield from (item for item in found if not isinstance(item, DataError))


def columns_of(source: Source, dataset: Dataset) -> dict[str, str]:
    """The columns that are mapped for a source: its own, else those of the data set."""
    return source.columns if source.columns is not None else dataset.columns
