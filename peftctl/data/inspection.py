"""What is in prepared rows: figures of all of them from one pass, in a few bytes of memory a row."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftctl.data.batches import Layout, Packing, Part, order
from peftctl.data.dataset import TrainOn
from peftctl.data.encode import Encoded

STOP, PAD, UNKNOWN, BYTE = 1, 2, 4, 8
"""What a token can be, as bits."""

BYTE_NAME = re.compile("<0x[89A-F][0-9A-F]>")
"""What vocabularies call a byte of a character that is not ASCII."""

SHOWN = 3
"""Rows that are told with their place; the rest is a number."""

BARS = 8
"""Bars of the histogram of lengths."""

LOOK = 64
"""Steps of the first epoch that padding is worked out for."""


@dataclass(kw_only=True)
class Census:
    """Figures of rows; what lists rows holds their numbers, from 0."""

    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Tokens of each row."""

    trained: array[int] = field(default_factory=lambda: array("i"))
    """Trained tokens of each row."""

    digests: array[int] = field(default_factory=lambda: array("Q"))
    """64 bits of a hash over the ids of each row."""

    origins: array[int] = field(default_factory=lambda: array("i"))
    """Of each row, which row it was before rows were split."""

    cut: list[int] = field(default_factory=list)
    """Rows that were cut to `max_length`."""

    unfinished: list[int] = field(default_factory=list)
    """Whole rows in which what is trained does not end with a stop token."""

    cut_short: list[int] = field(default_factory=list)
    """Rows that were cut inside what is trained, before its stop token."""

    idle: list[int] = field(default_factory=list)
    """Rows that train nothing."""

    empty: list[int] = field(default_factory=list)
    """Rows with an answer that is nothing but its stop token."""

    padded: list[int] = field(default_factory=list)
    """Rows that have the pad token among their tokens."""

    unknown: list[int] = field(default_factory=list)
    """Rows that have the token of what the tokenizer does not know."""

    unknown_tokens: int = 0
    byte_tokens: int = 0
    """Tokens that are one byte of a character that the vocabulary lacks."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained)

    def worth_telling(self) -> list[int]:
        """The first rows of every list."""
        lists = (self.cut, self.unfinished, self.cut_short, self.idle, self.empty, self.padded, self.unknown)
        return [row for rows in lists for row in rows[:SHOWN]]

    def repeats(self) -> list[tuple[int, int]]:
        """Rows that are the same as an earlier one, and which."""
        digests = np.asarray(self.digests)
        _, first, same = np.unique(digests, return_index=True, return_inverse=True)
        again = np.flatnonzero(first[same] != np.arange(len(digests)))
        return [(int(row), int(first[same[row]])) for row in again]

    def met_in(self, other: Census) -> list[tuple[int, int]]:
        """Rows that `other` has too, and which of its rows that is."""
        there = {digest: row for row, digest in reversed(list(enumerate(other.digests)))}
        return [(row, there[digest]) for row, digest in enumerate(self.digests) if digest in there]


def census(
    rows: Sequence[Encoded],
    tokenizer: Any,
    stop_ids: Collection[int],
    train_on: TrainOn = "assistant",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Census:
    """One pass over `rows`; `stop_ids` are the tokens that end what is trained."""
    found, kinds = Census(), kinds_of(tokenizer, stop_ids)
    by_turn = train_on in ("assistant", "last")
    for number, row in enumerate(rows):
        if number % 1000 == 999:
            progress(number + 1, len(rows))
        ids = np.asarray(row.ids)
        kind = kinds[ids]
        found.lengths.append(len(row))
        found.trained.append(row.trained)
        found.digests.append(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little"))
        # the pieces of a row follow one another; where those before its first are lost, that first one counts them
        begins = row.piece == 0 or row.cut > 0
        found.origins.append(found.origins[-1] + begins if number else 0)
        _note_ends(found, number, row, kind, by_turn)
        if kind.any():
            unknown, bytes_ = np.count_nonzero(kind & UNKNOWN), np.count_nonzero(kind & BYTE)
            found.unknown_tokens += int(unknown)
            found.byte_tokens += int(bytes_)
            found.unknown += [number] if unknown else []
            found.padded += [number] if (kind & PAD).any() else []
    return found


def kinds_of(tokenizer: Any, stop_ids: Collection[int]) -> NDArray[np.uint8]:
    """What each token of a vocabulary is, as bits [ids]."""
    names = tokenizer.get_vocab()
    kinds = np.zeros(max([len(tokenizer), *(id + 1 for id in names.values())]), dtype=np.uint8)
    # in Llama 2 a line break is a byte, too, and no character that is lacking
    kinds[[id for name, id in names.items() if BYTE_NAME.fullmatch(name)]] = BYTE
    for ids, bit in ((stop_ids, STOP), ([tokenizer.pad_token_id], PAD), ([tokenizer.unk_token_id], UNKNOWN)):
        kinds[[id for id in ids if id is not None]] |= bit
    # a word that is unknown has the end token in GPT-2: then the id alone does not tell
    if tokenizer.unk_token_id == tokenizer.eos_token_id and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] &= ~np.uint8(UNKNOWN)
    return kinds


def _note_ends(found: Census, number: int, row: Encoded, kind: NDArray[np.uint8], by_turn: bool) -> None:
    if row.truncated:
        found.cut.append(number)
    if not row.spans:
        found.idle.append(number)
        return
    if by_turn:
        ends = [bool(kind[end - 1] & STOP) for _, end in row.spans]
    else:  # what is trained may go on behind a stop token, and turns of users need none
        ends = [any((kind[start:end] & STOP).any() for start, end in row.spans)]
    if row.truncated and not ends[-1]:
        found.cut_short.append(number)
        ends.pop()
    if not all(ends) and row.pieces == 1:  # a turn may go on in the next piece
        found.unfinished.append(number)
    if row.pieces == 1 and any(end - start == 1 and kind[start] & STOP for start, end in row.spans):
        found.empty.append(number)


def chosen(found: Census, number: int) -> dict[int, str]:
    """At most so many rows worth looking at, and why: the first, the longest, one that was cut, others spread out."""
    rows = len(found.lengths)
    if not rows:
        return {}
    longest = max(range(rows), key=lambda row: (found.lengths[row], -row))
    candidates = [(0, "first"), (longest, "longest"), *((row, "cut") for row in found.cut[:1])]
    candidates += [(round((i + 1) * (rows - 1) / max(number - 2, 1)), "") for i in range(number)]
    candidates += [(row, "") for row in range(min(rows, number))]
    why: dict[int, str] = {}
    for row, reason in candidates:
        if row in why:
            why[row] = ", ".join(filter(None, [why[row], reason]))
        elif row < rows and len(why) < number:
            why[row] = reason
    return dict(sorted(why.items()))


def lengths_of(found: Census, max_length: int) -> dict[str, Any]:
    """Shortest, median, 95th percentile and longest row in tokens, and how many rows are how long."""
    lengths = np.asarray(found.lengths)
    step = next(size for size in _round_sizes() if size * BARS >= lengths.max())
    bars = np.bincount((lengths - 1) // step)
    median, p95 = (int(np.quantile(lengths, q, method="nearest")) for q in (0.5, 0.95))
    return {
        "min": int(lengths.min()),
        "median": median,
        "p95": p95,
        "max": int(lengths.max()),
        "max_length": max_length,
        "at_max_length": int((lengths == max_length).sum()),
        "histogram": [
            {"from": i * step + 1, "to": (i + 1) * step, "rows": int(n)}
            for i, n in enumerate(bars)
            if bars[: i + 1].any()
        ],
    }


def padding_of(
    lengths: Sequence[int], parts: Sequence[Part], batch_size: int, micro_batch_size: int, seed: int
) -> dict[str, float]:
    """Share of a batch that is padding, over the first steps, when rows are padded and when they are packed."""
    shares = {}
    rows: Any = [range(length) for length in lengths]  # a layout asks how long they are, nothing else
    ways: dict[str, Packing | None] = {"padded": None, "packed": "lines"}
    for name, packing in ways.items():
        layout = Layout(rows, micro_batch_size, 0, packing)
        area, tokens = 0, 0
        for step in islice(order([Part(len(lengths))], batch_size, seed, epoch=0), LOOK):
            tokens += sum(lengths[row] for row in step)
            area += sum(lines * width for lines, width in (layout.shape(part) for part in layout.micro_batches(step)))
        shares[name] = 1 - tokens / area
    return shares


def _round_sizes() -> Any:
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10
