"""The first look at all sources: every mistake in a file is known before anything slow begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from peftctl.data.dataset import Dataset, Source, Sources
from peftctl.data.examples import examples, format_of
from peftctl.data.file import Digest
from peftctl.data.formats import Format
from peftctl.data.mistakes import Mistakes
from peftctl.data.reading import Accept, spoken
from peftctl.data.sources import listed
from peftctl.errors import DataError

Meter = Callable[[str, int, int], None]
"""Hears what is being done, how far it has come, and how far it goes; 0 where that is not known yet."""


def silent(what: str, done: int, total: int) -> None:
    """Hears nothing."""


class Survey(NamedTuple):
    """What there is."""

    sources: list[tuple[Source, Format]]
    """Every source with the form of its rows."""
    chats: bool
    """Whether there are conversations among the rows."""
    rows: int
    """How many rows, bad ones too."""


def survey(
    spec: Sources,
    dataset: Dataset,
    root: Path,
    digest: Digest,
    say: Callable[[str], None],
    progress: Meter,
    accept: Accept,
) -> Survey:
    """Reads every row of `spec` once.

    Raises DataError with all mistakes; a source that cannot be read is one even where bad rows are skipped.
    """
    sources, chats, lost, rows, mistakes = [], False, False, 0, Mistakes()
    for source in listed(spec):
        try:
            format = format_of(source, dataset, root, say, mistakes)
            if format is None:
                lost = True
                continue
            sources.append((source, format))
            for item in examples(source, format, dataset, root, digest, accept):
                rows += 1
                progress("reading rows", rows, 0)
                chats = chats or spoken(item)
                if isinstance(item, DataError):
                    mistakes.add(item.problems)
        except DataError as error:
            lost = True
            mistakes.add(error.problems)
    if mistakes.rows and (lost or dataset.on_bad_row == "error"):
        raise mistakes.error()
    return Survey(sources, chats, rows)
