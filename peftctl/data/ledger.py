"""Where the rows of a data set went: nothing is cut, split or left out without being counted and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peftctl.data.dataset import Dataset
from peftctl.data.fitting import Encoded
from peftctl.data.mistakes import Mistakes, reason
from peftctl.data.store import Stored
from peftctl.errors import DataError, Problem

REASONS = 5
"""How many reasons are told, the most frequent first."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where rows went: `read == kept + dropped + skipped`; the truncated and the split are some of the kept."""

    read: int = 0
    kept: int = 0
    truncated: int = 0
    """Rows that were cut to `max_length`."""
    split: int = 0
    """Rows that were split; `pieces` tells into how many."""
    pieces: int = 0
    """What the split rows made."""
    dropped: int = 0
    """Rows longer than `max_length`, left out."""
    skipped: int = 0
    """Rows that cannot be used, left out."""
    tokens: int = 0
    """Tokens of what is kept."""
    trained_tokens: int = 0
    tokens_cut: int = 0
    """Tokens of kept rows that are in none of their pieces."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why rows were skipped, and how many."""

    def __post_init__(self) -> None:
        assert self.read == self.kept + self.dropped + self.skipped, self
        assert self.skipped == sum(self.reasons.values()), self
        assert self.truncated + self.split <= self.kept, self

    @property
    def left_out(self) -> Ledger:
        """The rows that are not there."""
        out = self.dropped + self.skipped
        return Ledger(read=out, dropped=self.dropped, skipped=self.skipped, reasons=self.reasons)

    @property
    def sequences(self) -> int:
        """What there is to train on: kept rows, with every piece of those that were split."""
        return self.kept - self.split + self.pieces

    def __add__(self, other: Ledger) -> Ledger:
        numbers = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "reasons"}
        return Ledger(**numbers, reasons=dict(Counter(self.reasons) + Counter(other.reasons)))


class Tally:
    """Counts rows as they are prepared."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def keep(self, pieces: Sequence[Encoded]) -> None:
        """A row, as it is trained."""
        split = pieces[0].pieces > 1
        self.numbers.update(
            kept=1,
            truncated=pieces[0].truncated,
            split=split,
            pieces=len(pieces) * split,
            tokens=sum(map(len, pieces)),
            trained_tokens=sum(piece.trained for piece in pieces),
            tokens_cut=pieces[0].cut,
        )

    def drop(self) -> None:
        """A row that is too long."""
        self.numbers["dropped"] += 1

    def skip(self, problems: Sequence[Problem]) -> None:
        """A row that cannot be used."""
        self.numbers["skipped"] += 1
        self.reasons[reason(problems[0])] += 1

    @property
    def read(self) -> int:
        """Rows so far."""
        return sum(self.numbers[name] for name in ("kept", "dropped", "skipped"))

    @property
    def ledger(self) -> Ledger:
        """The account so far."""
        return Ledger(read=self.read, **self.numbers, reasons=dict(self.reasons))


def of_rows(rows: Stored) -> Ledger:
    """The account of rows that were all kept."""
    pieces, split = rows.records, rows.records["pieces"] > 1
    first = pieces["first"]
    return Ledger(
        read=int(first.sum()),
        kept=int(first.sum()),
        truncated=int(pieces["truncated"][first].sum()),
        split=int(split[first].sum()),
        pieces=int(split.sum()),
        tokens=int(rows.lengths.sum()),
        trained_tokens=int(pieces["trained"].sum()),
        tokens_cut=int(pieces["cut"].sum()),
    )


def settle(ledger: Ledger, dataset: Dataset, mistakes: Mistakes) -> None:
    """Raises DataError when too much was left out, or everything."""
    out = ledger.dropped + ledger.skipped
    what = f"{out:,} of {ledger.read:,} rows left out ({ledger.dropped} too long, {ledger.skipped} that cannot be used)"
    if ledger.read and out / ledger.read > dataset.max_skipped:
        hint = "mend the data, or raise `dataset.max_skipped` (and `max_length`, where rows are too long)"
        raise mistakes.error(Problem(f"{what}, more than `dataset.max_skipped` {dataset.max_skipped:g}", hint))
    if not ledger.kept:
        raise mistakes.error(Problem(f"no row is left: {what}"))


def tell(name: str, ledger: Ledger, dataset: Dataset, say: Callable[[str], None]) -> None:
    """The account of the rows called `name`, in a line; another for every reason to skip some."""
    length = f"`max_length` {dataset.max_length:,}"
    lost = f", {ledger.tokens_cut:,} tokens lost" if ledger.tokens_cut else ""
    parts = [
        f"{ledger.truncated:,} cut to {length} tokens" * bool(ledger.truncated),
        f"{ledger.split:,} longer than {length} split into {ledger.pieces:,}" * bool(ledger.split),
        f"{ledger.dropped:,} longer than {length} dropped" * bool(ledger.dropped),
        f"{ledger.skipped:,} skipped" * bool(ledger.skipped),
    ]
    happened = ", ".join(part for part in parts if part)
    kept = "all kept" if ledger.kept == ledger.read else f"{ledger.kept:,} kept"
    rows = f"{ledger.read:,} row{'s' * (ledger.read != 1)}"
    say(f"{name}: {rows} read, {kept}" + (f"; {happened}{lost}" if happened else ""))
    ranked = sorted(ledger.reasons.items(), key=lambda item: (-item[1], item[0]))
    for why, number in ranked[:REASONS]:
        say(f"skipped {number:,}: {why}")
    if more := sum(number for _, number in ranked[REASONS:]):
        say(f"skipped {more:,} for {len(ranked) - REASONS} other reasons")


def too_many(mistakes: Mistakes, rows: int) -> DataError:
    """The error that ends a preparation whose first mistakes say enough."""
    return mistakes.error(Problem(f"... stopped after {rows:,} rows"))
