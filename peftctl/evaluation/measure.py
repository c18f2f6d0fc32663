"""The figures of one model over evaluation rows, each sequence scored once, in memory that does not grow with rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peftctl.data.encode import Encoded, Encoder
from peftctl.data.formats import Chat, Pair, Parsed, Text
from peftctl.errors import DataError
from peftctl.evaluation.evaluation import Evaluation
from peftctl.evaluation.generation import generate
from peftctl.evaluation.scoring import Tick, key, score, without_end


def measure(
    model: nn.Module,
    rows: Sequence[Parsed],
    encoder: Encoder,
    evaluation: Evaluation,
    pad_id: int,
    tick: Tick = lambda done, total: None,
) -> dict[str, float]:
    """The wanted metrics of `model` over `rows`, and `rows`, their number.

    Raises DataError when a row's answer is none of `labels`, or no row has an answer at all.
    """
    rows = rows[: evaluation.max_rows]
    wanted = evaluation.wanted
    truth = [piece for row in rows for piece in encoder.encode(row)]
    if not truth:
        raise DataError("dataset.eval: no row is left to evaluate", "look at `max_length` and `on_long`")
    choices = [[answered(row, label) for label in evaluation.labels] for row in rows] if "accuracy" in wanted else []
    if choices:
        check_answers(rows, evaluation.labels)
    whole = any_begins_another(evaluation.labels)
    encoded_choices = [[compared(encoder, choice, whole) for choice in group] for group in choices]
    sequences = [*truth, *(e for group in encoded_choices for e in group)]
    scores = score(model, sequences, evaluation.batch_size, pad_id, tick)

    figures: dict[str, float] = {"rows": len(truth)}
    loss = sum(scores[key(e)] for e in truth) / sum(e.trained for e in truth)
    if "loss" in wanted:
        figures["loss"] = loss
    if "perplexity" in wanted:
        figures["perplexity"] = math.exp(min(loss, 700))  # beyond that a float has no room
    if "accuracy" in wanted:
        best = [min(range(len(group)), key=lambda i: scores[key(group[i])]) for group in encoded_choices]
        right = [evaluation.labels[i] == answer(row) for i, row in zip(best, rows, strict=True)]
        figures["accuracy"] = sum(right) / len(right)
    if "exact_match" in wanted:
        given = [row for row in rows if not isinstance(row, Text)]
        if not given:
            raise DataError(f"{rows[0].place}: plain text has no answer to generate", "remove `exact_match`")
        texts = generate(model, given, encoder, evaluation.max_new_tokens, evaluation.batch_size, tick)
        exact = [text.strip() == answer(row) for text, row in zip(texts, given, strict=True)]
        figures["exact_match"] = sum(exact) / len(exact)
    return figures


def any_begins_another(labels: Sequence[str]) -> bool:
    """Whether only the token that ends an answer tells two labels apart, as in `yes` and `yes, but`.

    Else that token does not count in the comparison: a base model that prefers the right word may well talk on.
    """
    return any(one != other and other.startswith(one) for one in labels for other in labels)


def answer(row: Parsed) -> str:
    """What a row should be answered with, without white space around it."""
    if isinstance(row, Chat):
        return str(row.messages[-1]["content"]).strip()
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


def summary(figures: dict[str, Any]) -> dict[str, str]:
    """The figures as a person reads them."""
    return {name: in_words(name, value) for name, value in figures.items()}


def in_words(name: str, value: float) -> str:
    if name in ("accuracy", "exact_match"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
