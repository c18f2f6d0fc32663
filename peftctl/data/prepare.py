"""Sources to encoded rows, with an account of every row.

Two passes: the first reads and checks everything, so that every mistake is known before the slow part; the second
encodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from peftctl.data.dataset import Dataset, Source, Sources
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.examples import examples, format_of
from peftctl.data.file import Digest
from peftctl.data.formats import Chat, Format, Parsed
from peftctl.data.ledger import Ledger, Tally, of_rows, settle, tell, too_many
from peftctl.data.mistakes import SHOWN, Mistakes
from peftctl.data.sources import listed
from peftctl.data.template import find
from peftctl.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows ready to train on or to measure with, in the order of their sources."""

    rows: Sequence[Encoded]
    ledger: Ledger
    """Where the rows went."""

    sources: Mapping[str, Ledger]
    """The same for every source, by its path, before anything was held out."""

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
    mistakes, tallies = Mistakes(), {source.path: Tally() for source, _ in sources}
    for source, format in sources:
        tally = tallies[source.path]
        for item in examples(source, format, dataset, root):
            try:
                if isinstance(item, DataError):
                    raise item
                pieces = encoder.encode(item)
            except DataError as error:
                tally.skip(error.problems)
                mistakes.add(error.problems)
                if dataset.on_bad_row == "error" and len(mistakes.problems) == SHOWN:
                    raise too_many(mistakes, sum(tally.read for tally in tallies.values())) from None
                continue
            if not pieces:
                tally.drop()
                continue
            tally.keep(pieces)
            rows += pieces
            if keep_parsed:
                parsed.append(item)
    if mistakes.rows and dataset.on_bad_row == "error":
        raise mistakes.error()

    ledgers = {path: tally.ledger for path, tally in tallies.items()}
    ledger = sum(ledgers.values(), Ledger())
    settle(ledger, dataset, mistakes)
    for path, part in ledgers.items():
        tell(path, part, dataset, say)
    for text, _ in mistakes.problems:
        say(f"skipped: {text}")
    if encoder.spelled:
        say(f"{encoder.spelled} of {ledger.read} rows spell special tokens in their text: taken as ordinary text")
    return Prepared(
        rows=rows,
        ledger=ledger,
        sources=ledgers,
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
    ledger = of_rows(pieces[i] for i in chosen)
    if whole:
        ledger += prepared.ledger.left_out
    parsed = [prepared.parsed[i] for i in chosen] if prepared.parsed else ()
    return replace(prepared, rows=rows, ledger=ledger, parsed=parsed)


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
