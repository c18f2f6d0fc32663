"""What can be wrong with prepared rows, looked for in the figures of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftctl.data.batches import collate
from peftctl.data.encode import Encoded
from peftctl.data.inspection import SHOWN, Census
from peftctl.engine.sample import IGNORED

State = Literal["ok", "warning", "failed"]
Places = Callable[[Census, Sequence[int]], list[str]]
"""The places (`file:line`) of the first of some rows."""

MANY_CUT = 0.05
"""Share of rows cut to `max_length` from which it is a warning."""

LITTLE_TRAINED = 0.02
"""Share of trained tokens below which it is a warning: most of the work goes into what is not learned."""

MANY_BYTES = 0.05
"""Share of tokens that are single bytes from which it is a warning: the vocabulary does not know the language."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked for."""

    name: str
    state: State
    text: str
    """What was found."""

    hint: str | None = None
    """What to do about it."""

    places: tuple[str, ...] = ()
    """The first rows that it is about."""


def judged(
    name: str, bad: Sequence[str], rows: int, good: str, found: str, hint: str | None, state: State = "warning"
) -> Check:
    """A check that is fine when no row is bad; `found` says what is wrong with `rows` rows, which begin at `bad`."""
    if not rows:
        return Check(name=name, state="ok", text=good)
    return Check(name=name, state=state, text=found, hint=hint, places=tuple(bad[:SHOWN]))


def of_figures(found: Census, places: Places, max_length: int) -> list[Check]:
    """Stop tokens, rows that train nothing, answers, lengths and words the tokenizer does not know."""

    def at(numbers: Sequence[int]) -> list[str]:
        return places(found, numbers[:SHOWN])

    rows = len(found.lengths)
    share = found.trained_tokens / max(found.tokens, 1)
    checks = [_stops(found, at)]
    checks.append(
        judged(
            "trained rows",
            at(found.idle),
            len(found.idle),
            f"each of {counted(rows, 'row')} trains at least one token",
            f"{counted(len(found.idle), 'row')} without a trained token",
            "prepare the data anew; if that does not help, it is a bug in peftctl",
            "failed",
        )
    )
    checks.append(
        Check(
            name="trained share",
            state="warning" if share < LITTLE_TRAINED else "ok",
            text=f"{percent(share)} of the tokens are trained",
            hint="prompts are much longer than answers: is the right column the answer?"
            if share < LITTLE_TRAINED
            else None,
        )
    )
    checks.append(
        judged(
            "answers",
            at(found.empty),
            len(found.empty),
            "no answer is empty",
            f"{counted(len(found.empty), 'row')} with an answer that is nothing but its stop token",
            "the model learns to say nothing there: take these rows out, or set `train: false` on the turn",
        )
    )
    cut = len(found.cut) / max(rows, 1)
    checks.append(
        judged(
            "lengths",
            at(found.cut),
            cut > MANY_CUT,
            f"{counted(len(found.cut), 'row')} of {rows:,} cut to `max_length` {max_length:,}"
            if found.cut
            else f"no row is longer than `max_length` {max_length:,}",
            f"{counted(len(found.cut), 'row')} ({percent(cut)}) cut to `max_length` {max_length:,}",
            "raise `dataset.max_length`, or choose `on_long: split` or `drop`",
        )
    )
    checks.append(_unknown(found, at))
    return checks


def _stops(found: Census, at: Callable[[Sequence[int]], list[str]]) -> Check:
    name = "stop tokens"
    if found.unfinished:
        return Check(
            name=name,
            state="failed",
            text=f"{counted(len(found.unfinished), 'row')} with a trained turn that no stop token ends",
            hint="prepare the data anew; if that does not help, it is a bug in peftctl",
            places=tuple(at(found.unfinished)),
        )
    return judged(
        name,
        at(found.cut_short),
        len(found.cut_short),
        "every trained turn ends with a trained stop token",
        f"{counted(len(found.cut_short), 'row')} cut before the stop token: the model does not learn to stop there",
        "raise `dataset.max_length`, or set `on_long: drop`",
    )


def _unknown(found: Census, at: Callable[[Sequence[int]], list[str]]) -> Check:
    name, tokens = "unknown characters", max(found.tokens, 1)
    if found.unknown_tokens:
        many = f"{counted(found.unknown_tokens, 'token')} in {counted(len(found.unknown), 'row')}"
        return Check(
            name=name,
            state="warning",
            text=f"{many} stand for what the tokenizer does not know",
            hint="what they stood for is lost: replace these characters, or take another base model",
            places=tuple(at(found.unknown)),
        )
    many_bytes = found.byte_tokens / tokens > MANY_BYTES
    text = "the tokenizer knows every character"
    if found.byte_tokens:
        text = f"{counted(found.byte_tokens, 'token')} ({percent(found.byte_tokens / tokens)}) are single bytes"
    hint = "this vocabulary lacks the characters of these texts: rows get long and are learned slowly"
    return Check(name=name, state="warning" if many_bytes else "ok", text=text, hint=hint if many_bytes else None)


def of_padding(
    found: Census, rows: Sequence[Encoded], tokenizer: Any, stop_ids: Sequence[int], places: Places
) -> Check:
    """Whether padding could be taken for a token of a row: a padded batch is made, and its labels compared."""
    name, pad = "padding", tokenizer.pad_token_id
    token = f"`{tokenizer.convert_ids_to_tokens(pad)}`"
    sides: tuple[Literal["right", "left"], ...] = ("right", "left")
    for side in sides:
        labels = collate(rows, pad, side)["labels"].tolist()
        for number, (row, line) in enumerate(zip(rows, labels, strict=True)):
            blank = [IGNORED] * (len(line) - len(row))
            if line != ([*row.labels, *blank] if side == "right" else [*blank, *row.labels]):
                text = f"the labels of a padded batch differ from those of row {number + 1} alone"
                return Check(name=name, state="failed", text=text, hint="this is a bug in peftctl")
    if pad in stop_ids or pad == tokenizer.eos_token_id:
        text = f"padded with {token}, which ends answers too: padding is masked by its place, so the token is trained"
        return Check(name=name, state="ok", text=text)
    return judged(
        name,
        places(found, found.padded[:SHOWN]),
        len(found.padded),
        f"padded with {token}, which no row has",
        f"{counted(len(found.padded), 'row')} with the pad token {token} in them",
        "here it is harmless, as padding is masked by its place; other programs may take it for padding",
    )


def of_repeats(found: Census, rows: str, places: Places) -> Check:
    """Whether rows are there more than once."""
    repeats = found.repeats()
    share = percent(len(repeats) / max(len(found.lengths), 1))
    return judged(
        "duplicates",
        places(found, [row for row, _ in repeats[:SHOWN]]),
        len(repeats),
        f"no two rows of `{rows}` are the same",
        f"{counted(len(repeats), 'row')} of `{rows}` ({share}) the same as an earlier one",
        "what is there n times counts n times: take the others out unless that is meant",
    )


def of_leaks(train: Census, sets: Mapping[str, Census], places: Mapping[str, Places]) -> list[Check]:
    """Whether rows to evaluate on are trained."""
    checks = []
    for name, held in sets.items():
        leaks = held.met_in(train)
        pairs = [
            f"{' '.join(places[name](held, [row]))} = {' '.join(places['train'](train, [there]))}"
            for row, there in leaks[:SHOWN]
        ]
        share = percent(len(leaks) / max(len(held.lengths), 1))
        checks.append(
            judged(
                "leaks",
                pairs,
                len(leaks),
                f"no row of `{name}` is trained",
                f"{counted(len(leaks), 'row')} of `{name}` ({share}) trained too",
                "figures measured on what was trained say nothing: take these rows out of one of the two",
            )
        )
    return checks


def counted(number: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def percent(share: float) -> str:
    """`12 %`, `0.3 %`."""
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
