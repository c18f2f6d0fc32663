"""What one model makes of evaluation rows: each sequence scored once, each answer generated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from peftctl.data.encode import Encoded, Encoder
from peftctl.data.formats import Chat, Pair, Parsed, Text
from peftctl.errors import DataError
from peftctl.evaluation.evaluation import Evaluation
from peftctl.evaluation.generation import generate
from peftctl.evaluation.metric import Seen
from peftctl.evaluation.scoring import Tick, key, score, without_end


def measure(
    model: nn.Module,
    rows: Sequence[Parsed],
    encoder: Encoder,
    evaluation: Evaluation,
    pad_id: int,
    tick: Tick = lambda done, total: None,
    rejected: Sequence[Parsed] = (),
) -> Seen:
    """What the wanted metrics read of `model` and `rows`, in the order of `rows`; `rejected` are their worse answers.

    Raises DataError when a row's answer is none of `labels`, when no row has an answer at all, or there are no rows.
    """
    if not rows:
        raise DataError("dataset.eval: no row is left to evaluate", "look at `max_length` and `on_long`")
    truth = [encoder.encode(row) for row in rows] if evaluation.needs("truth") or rejected else []
    worse = [encoder.encode(row) for row in rejected]
    choices = labelled(rows, encoder, evaluation.labels) if evaluation.needs("labels") else []
    sequences = [*(piece for row in (*truth, *worse) for piece in row), *(one for group in choices for one in group)]
    scores = score(model, sequences, evaluation.batch_size, pad_id, tick) if sequences else {}
    seen = Seen(labels=evaluation.labels)
    if truth:
        found = [[scores[key(piece)] for piece in row] for row in truth]
        seen = replace(
            seen,
            nats=np.array([sum(one.nats for one in row) for row in found]),
            right=np.array([sum(one.right for one in row) for row in found], dtype=np.float64),
            tokens=np.array([sum(piece.trained for piece in row) for row in truth], dtype=np.float64),
        )
    if worse:
        seen = replace(seen, rejected=np.array([sum(scores[key(piece)].nats for piece in row) for row in worse]))
    if choices:
        best = [min(range(len(group)), key=lambda i: scores[key(group[i])].nats) for group in choices]
        seen = replace(seen, choice=best, truth=[evaluation.labels.index(answer(row)) for row in rows])
    said = spoken(model, rows, encoder, evaluation, tick)
    return replace(seen, answers=[None if isinstance(row, Text) else answer(row) for row in rows], said=said)


def labelled(rows: Sequence[Parsed], encoder: Encoder, labels: Sequence[str]) -> list[list[Encoded]]:
    """Every row with each label as its answer. Raises DataError where a row's own answer is none of them."""
    choices = [[answered(row, label) for label in labels] for row in rows]
    check_answers(rows, labels)
    whole = any_begins_another(labels)
    return [[compared(encoder, choice, whole) for choice in group] for group in choices]


def spoken(
    model: nn.Module, rows: Sequence[Parsed], encoder: Encoder, evaluation: Evaluation, tick: Tick
) -> list[str | None]:
    """The generated answers, of all rows or of the first `samples`; None where there is none."""
    most = len(rows) if evaluation.needs("text") else evaluation.samples
    asked = [i for i, row in enumerate(rows) if not isinstance(row, Text)][:most]
    if most and not asked:
        raise DataError(f"{rows[0].place}: plain text has no answer to generate", "remove what generates answers")
    said: list[str | None] = [None] * len(rows)
    if asked:
        given = [rows[i] for i in asked]
        texts = generate(model, given, encoder, evaluation.max_new_tokens, evaluation.batch_size, tick)
        for i, text in zip(asked, texts, strict=True):
            said[i] = text.strip()
    return said


def any_begins_another(labels: Sequence[str]) -> bool:
    """Whether only the token that ends an answer tells two labels apart, as in `yes` and `yes, but`.

    Else that token does not count in the comparison: a base model that prefers the right word may well talk on.
    """
    return any(one != other and other.startswith(one) for one in labels for other in labels)


def answer(row: Parsed) -> str:
    """What a row should be answered with, without white space around it."""
    if isinstance(row, Chat):
        return str(row.messages[-1].get("content") or "").strip()
    return row.completion.strip() if isinstance(row, Pair) else ""


def answered(row: Parsed, label: str) -> Parsed:
    """The row with `label` as its answer; only that answer counts."""
    if isinstance(row, Chat):
        messages = [*row.messages[:-1], {**row.messages[-1], "content": label}]
        return replace(row, messages=messages, first=len(messages) - 1)
    if isinstance(row, Pair):
        lead = row.completion[: len(row.completion) - len(row.completion.lstrip())]
        return replace(row, completion=lead + label)
    raise DataError(f"{row.place}: plain text has no answer to compare with `eval.labels`", "remove `labels`")


def check_answers(rows: Sequence[Parsed], labels: Sequence[str]) -> None:
    """Raise DataError for the first row whose answer is none of the labels."""
    for row in rows:
        if not isinstance(row, Text) and answer(row) not in labels:
            names = ", ".join(f"`{label}`" for label in labels)
            text = f"{row.place}: the answer `{answer(row)[:60]}` is none of `eval.labels`"
            raise DataError(text, f"labels: {names}")


def compared(encoder: Encoder, row: Parsed, whole: bool) -> Encoded:
    """The row encoded, the token that ends its answer trained only with `whole`; too long a row cannot be compared."""
    encoded = encoder.whole(row)
    if len(encoded) > encoder.max_length:
        raise DataError(f"{row.place}: too long to compare its labels", "raise `dataset.max_length`")
    return encoded if whole else without_end(encoded)


def confusion(seen: Seen) -> list[list[int]]:
    """How often each label (a row of the table) was taken for each label (a column)."""
    table = np.zeros((len(seen.labels), len(seen.labels)), dtype=int)
    np.add.at(table, (np.asarray(seen.truth), np.asarray(seen.choice)), 1)
    counts: list[list[int]] = table.tolist()
    return counts


def question(row: Parsed) -> Any:
    """What a row's answer follows, for a person to read."""
    return row.messages[:-1] if isinstance(row, Chat) else row.prompt if isinstance(row, Pair) else row.text
