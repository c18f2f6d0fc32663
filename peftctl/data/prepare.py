"""Sources to encoded rows, with an account of every row.

Two passes: the first reads and checks everything, so that every mistake is known before the slow part; the second
encodes. Rows go to files as they are made (`store.py`), which are kept for the next time (`cache.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftctl.data import cache
from peftctl.data.batches import Part
from peftctl.data.dataset import Dataset, Sources
from peftctl.data.examples import examples
from peftctl.data.formats import Example, Format
from peftctl.data.ledger import Ledger, Tally, settle, tell, too_many
from peftctl.data.mistakes import SHOWN, Mistakes
from peftctl.data.reading import SUPERVISED, Accept, Reading, RowEncoder
from peftctl.data.store import Stored, Writer
from peftctl.data.survey import Meter, Survey, silent, survey
from peftctl.data.template import find
from peftctl.data.workers import outcomes
from peftctl.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows ready to train on or to measure with, in the order of their sources."""

    rows: Stored
    ledger: Ledger
    """Where the rows went."""

    sources: Mapping[str, Ledger]
    """The same for every source, by its path, before anything was held out."""

    parts: Sequence[Part]
    """How the rows follow one another, source by source, and how often they are seen."""

    formats: tuple[Format, ...]
    """What the rows are, one entry per source."""

    digest: str
    """SHA-256 over the bytes of the files, or the rows of hub data sets: other data, other digest."""

    chat_template: str | None
    """The Jinja text that rendered the conversations; None when there were none."""

    stop_ids: tuple[int, ...]
    """The tokens that end an answer: generation has to stop at them."""

    parsed: Sequence[Example] = ()
    """The same rows before they were encoded, when `prepare` was asked to keep them."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = self.rows.lengths.tolist()
        return lengths


@dataclass
class Work:
    """What a preparation has come to."""

    tallies: dict[str, Tally]
    sizes: list[int] = field(default_factory=list)
    """Sequences that each source made."""
    mistakes: Mistakes = field(default_factory=Mistakes)
    parsed: list[Example] = field(default_factory=list)


def prepare(
    spec: Sources,
    dataset: Dataset,
    tokenizer: Any,
    root: Path,
    say: Callable[[str], None] = lambda line: None,
    *,
    keep_parsed: bool = False,
    progress: Meter = silent,
    reading: Reading = SUPERVISED,
) -> Prepared:
    """Reads, checks and encodes the rows of `spec`: the `train` or `eval` of `dataset`.

    Args:
        root: where relative paths start.
        say: is told what was guessed, and where the rows went.
        keep_parsed: keeps the texts in memory beside the ids, for metrics that need them.
        reading: what rows become, where that is not what supervised fine-tuning trains.
        progress: hears how far it has come, now and then; what it raises ends the preparation.

    Raises DataError with every row that cannot be used, when too many had to be left out, and when nothing is left;
    StorageError when there is no room for the rows.
    """
    key = None if keep_parsed else cache.key(spec, dataset, tokenizer, root, reading)
    if key is not None and (found := cache.find(key, say)) is not None:
        return reused(*found, say)
    if key is not None and not cache.writable(say):
        key = None
    said: list[str] = []

    def heard(line: str) -> None:
        said.append(line)
        say(line)

    sha = hashlib.sha256()
    seen = survey(spec, dataset, root, sha.update, heard, progress, reading.accept)
    template = find(dataset.chat_template, tokenizer, root, heard) if seen.chats else None
    encoder = reading.encoder(dataset, tokenizer, template)
    with cache.workspace(to_keep=key is not None) as folder:
        work = encoded(seen, dataset, encoder, root, folder, keep_parsed, progress, reading.accept)
        ledgers = {path: tally.ledger for path, tally in work.tallies.items()}
        ledger = sum(ledgers.values(), Ledger())
        settle(ledger, dataset, work.mistakes)
        for path, one in ledgers.items():
            tell(path, one, dataset, heard)
        for text, _ in work.mistakes.problems:
            heard(f"skipped: {text}")
        if encoder.spelled:
            spelled = f"{encoder.spelled:,} of {ledger.read:,} rows spell special tokens in their text"
            heard(f"{spelled}: taken as {'ordinary text' if encoder.splits_special_tokens else 'what they spell'}")
        prepared = Prepared(
            rows=Stored(folder),
            ledger=ledger,
            sources=ledgers,
            parts=[Part(size, source.weight) for size, (source, _) in zip(work.sizes, seen.sources, strict=True)],
            formats=tuple(format for _, format in seen.sources),
            digest=sha.hexdigest(),
            chat_template=template,
            stop_ids=tuple(sorted(encoder.stop_ids)),
            parsed=work.parsed,
        )
        if key is not None:
            facts = {name: value for name, value in vars(prepared).items() if name not in ("rows", "parsed")}
            facts |= {"ledger": asdict(ledger), "sources": {path: asdict(one) for path, one in ledgers.items()}}
            cache.keep(folder, key, {"facts": facts, "said": said})
    return prepared


def reused(folder: Path, manifest: dict[str, Any], say: Callable[[str], None]) -> Prepared:
    """What the cache has, told again."""
    facts = manifest["facts"]
    for line in manifest["said"]:
        say(line)
    rows = Stored(folder)
    say(f"prepared before: {len(rows):,} rows from the cache")
    return Prepared(
        rows=rows,
        ledger=Ledger(**facts["ledger"]),
        sources={path: Ledger(**one) for path, one in facts["sources"].items()},
        parts=[Part(*part) for part in facts["parts"]],
        formats=tuple(facts["formats"]),
        digest=facts["digest"],
        chat_template=facts["chat_template"],
        stop_ids=tuple(facts["stop_ids"]),
    )


def encoded(
    seen: Survey,
    dataset: Dataset,
    encoder: RowEncoder,
    root: Path,
    folder: Path,
    keep_parsed: bool,
    progress: Meter,
    accept: Accept,
) -> Work:
    """Encodes every row of the sources into files in `folder`. Raises DataError where mistakes are errors."""
    work, writer = Work({source.path: Tally() for source, _ in seen.sources}), Writer(folder)
    done = 0
    for source, format in seen.sources:
        tally, before = work.tallies[source.path], writer.rows
        for item, made in outcomes(examples(source, format, dataset, root, accept=accept), encoder, seen.rows):
            done += 1
            progress("preparing rows", done, seen.rows)
            if isinstance(made, DataError):
                tally.skip(made.problems)
                work.mistakes.add(made.problems)
                if dataset.on_bad_row == "error" and len(work.mistakes.problems) == SHOWN:
                    raise too_many(work.mistakes, done)
            elif not made:
                tally.drop()
            else:
                tally.keep(made)
                writer.write(made)
                if keep_parsed:
                    work.parsed.append(item)  # type: ignore[arg-type]
        work.sizes.append(writer.rows - before)
    writer.close()
    if work.mistakes.rows and dataset.on_bad_row == "error":
        raise work.mistakes.error()
    return work
