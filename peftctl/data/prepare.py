"""Sources to encoded rows, with an account of every row.

Two passes: the first reads and checks everything, so that every mistake is known before the slow part; the second
encodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from peftctl.data.account import SHOWN, Counts, Mistakes, settle
from peftctl.data.dataset import Dataset, Source, Sources
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.examples import examples, format_of
from peftctl.data.file import Digest
from peftctl.data.formats import Chat, Format, Parsed
from peftctl.data.sources import listed
from peftctl.data.template import find
from peftctl.errors import DataError, Problem


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows ready to train on or to measure with, in the order of their sources."""

    rows: Sequence[Encoded]
    counts: Counts
    formats: tuple[Format, ...]
    """What the rows are, one entry per source."""

    digest: str
    """SHA-256 over the bytes of the files, or the rows of hub data sets: other data, other digest."""

    chat_template: str | None
    """The Jinja text that rendered the conversations; None when there were none."""

    stop_ids: tuple[int, ...]
    """The tokens that end an answer: generation has to stop at them."""

    parsed: Sequence[Parsed] = ()
    """The same rows before they were encoded, when `prepare` was asked to keep them."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.rows]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def trained_tokens(self) -> int:
        return sum(row.trained for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


def prepare(
    spec: Sources,
    dataset: Dataset,
    tokenizer: Any,
    root: Path,
    say: Callable[[str], None] = lambda line: None,
    *,
    keep_parsed: bool = False,
) -> Prepared:
    """Reads, checks and encodes the rows of `spec`: the `train` or `eval` of `dataset`.

    `root` is where relative paths start; `say` is told what was guessed and what was cut or left out. Raises DataError
    with every row that cannot be used, when too many had to be left out, and when nothing is left. With `keep_parsed`
    the texts stay in memory beside the ids, for metrics that need them.
    """
    sha = hashlib.sha256()
    sources, chats = _survey(spec, dataset, root, sha.update, say)
    template = find(dataset.chat_template, tokenizer, root, say) if chats else None
    encoder = Encoder.of(dataset, tokenizer, template)
    rows: list[Encoded] = []
    parsed: list[Parsed] = []
    number, dropped, mistakes = 0, 0, Mistakes()
    for item in (item for source, format in sources for item in examples(source, format, dataset, root)):
        number += 1
        try:
            if isinstance(item, DataError):
                raise item
            pieces = encoder.encode(item)
        except DataError as error:
            mistakes.add(error.problems)
            if dataset.on_bad_row == "error" and len(mistakes.problems) == SHOWN:
                raise mistakes.error(Problem(f"... stopped after {number} rows")) from None
            continue
        dropped += not pieces
        rows += pieces
        if keep_parsed and pieces:
            parsed.append(item)
    if mistakes.rows and dataset.on_bad_row == "error":
        raise mistakes.error()

    if encoder.spelled:
        say(f"{encoder.spelled} of {number} rows spell special tokens in their text: taken as ordinary text")
    if pieces := [row for row in rows if row.pieces > 1]:
        split, cut = len(_by_row(pieces)), sum(piece.cut for piece in pieces)
        say(f"{split} rows longer than {dataset.max_length} tokens split into {len(pieces)}; {cut} tokens left out")
    counts = Counts(
        read=number,
        kept=number - dropped - mistakes.rows,
        truncated=sum(row.truncated for row in rows),
        dropped=dropped,
        skipped=mistakes.rows,
    )
    settle(counts, dataset, mistakes, say)
    return Prepared(
        rows=rows,
        counts=counts,
        formats=tuple(format for _, format in sources),
        digest=sha.hexdigest(),
        chat_template=template,
        stop_ids=tuple(sorted(encoder.stop_ids)),
        parsed=parsed,
    )


def hold_out(prepared: Prepared, fraction: float, seed: int) -> tuple[Prepared, Prepared]:
    """Training rows and, held out of them, evaluation rows: a pure function of the rows and the seed.

    At least one row is on either side, with all its pieces; rows that were dropped or skipped stay in the account of
    the training rows.
    """
    pieces = _by_row(prepared.rows)
    number = len(pieces)
    if number < 2:
        raise DataError("dataset.eval: one row cannot be split into training and evaluation", "name evaluation rows")
    random = Random(f"hold out {seed}")
    shuffled = sorted(range(number), key=lambda _: random.random())
    held = set(shuffled[: min(max(round(number * fraction), 1), number - 1)])
    rest = [i for i in range(number) if i not in held]
    return _part(prepared, pieces, rest, whole=True), _part(prepared, pieces, sorted(held))


def _by_row(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """The pieces of each row, which follow one another."""
    found: list[list[Encoded]] = []
    for row in rows:
        if found and found[-1][-1].piece < row.piece:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _part(prepared: Prepared, pieces: list[list[Encoded]], chosen: list[int], whole: bool = False) -> Prepared:
    rows = [piece for i in chosen for piece in pieces[i]]
    dropped, skipped = (prepared.counts.dropped, prepared.counts.skipped) if whole else (0, 0)
    counts = Counts(
        read=len(chosen) + dropped + skipped,
        kept=len(chosen),
        truncated=sum(row.truncated for row in rows),
        dropped=dropped,
        skipped=skipped,
    )
    parsed = [prepared.parsed[i] for i in chosen] if prepared.parsed else ()
    return replace(prepared, rows=rows, counts=counts, parsed=parsed)


def _survey(
    spec: Sources, dataset: Dataset, root: Path, digest: Digest, say: Callable[[str], None]
) -> tuple[list[tuple[Source, Format]], bool]:
    """Every source with its format, and whether there are conversations among the rows.

    Raises DataError with all mistakes; a source that cannot be read is one even where bad rows are skipped.
    """
    sources, chats, lost, mistakes = [], False, False, Mistakes()
    for source in listed(spec):
        try:
            format = format_of(source, dataset, root, say, mistakes)
            if format is None:
                lost = True
                continue
            sources.append((source, format))
            for item in examples(source, format, dataset, root, digest):
                chats = chats or isinstance(item, Chat)
                if isinstance(item, DataError):
                    mistakes.add(item.problems)
        except DataError as error:
            lost = True
            mistakes.add(error.problems)
    if mistakes.rows and (lost or dataset.on_bad_row == "error"):
        raise mistakes.error()
    return sources, chats
