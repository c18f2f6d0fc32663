"""What one model makes of evaluation rows: each sequence scored once, each answer generated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from peftctl.data.encode import Encoded
from peftctl.data.formats import Example
from peftctl.data.reading import RowEncoder
from peftctl.errors import DataError
from peftctl.evaluation.answers import answer, answered, any_begins_another, check_answers
from peftctl.evaluation.evaluation import Evaluation
from peftctl.evaluation.generation import generate
from peftctl.evaluation.metric import Seen
from peftctl.evaluation.scoring import Tick, key, score
from peftctl.tasks import Task


def measure(
    model: nn.Module,
    task: Task,
    rows: Sequence[Example],
    encoder: RowEncoder,
    evaluation: Evaluation,
    pad_id: int,
    tick: Tick = lambda done, total: None,
    rejected: Sequence[Example] = (),
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
    scores = score(model, task, sequences, evaluation.batch_size, pad_id, tick) if sequences else {}
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
        seen = replace(seen, choice=best, truth=[evaluation.labels.index(answer(row) or "") for row in rows])
    said = spoken(model, rows, encoder, evaluation, tick) if "text" in task.measures else [None] * len(rows)
    return replace(seen, answers=[answer(row) for row in rows], said=said)


def labelled(rows: Sequence[Example], encoder: RowEncoder, labels: Sequence[str]) -> list[list[Encoded]]:
    """Every row with each label as its answer. Raises DataError where a row's own answer is none of them."""
    choices = [[answered(row, label) for label in labels] for row in rows]
    check_answers(rows, labels)
    whole = any_begins_another(labels)
    return [[encoder.compared(choice, whole) for choice in group] for group in choices]


def spoken(
    model: nn.Module, rows: Sequence[Example], encoder: RowEncoder, evaluation: Evaluation, tick: Tick
) -> list[str | None]:
    """The generated answers, of all rows or of the first `samples`; None where there is none."""
    most = len(rows) if evaluation.needs("text") else evaluation.samples
    asked = [i for i, row in enumerate(rows) if answer(row) is not None][:most]
    if most and not asked:
        raise DataError(f"{rows[0].place}: plain text has no answer to generate", "remove what generates answers")
    said: list[str | None] = [None] * len(rows)
    if asked:
        given = [rows[i] for i in asked]
        texts = generate(model, given, encoder, evaluation.max_new_tokens, evaluation.batch_size, tick)
        for i, text in zip(asked, texts, strict=True):
            said[i] = text.strip()
    return said


def confusion(seen: Seen) -> list[list[int]]:
    """How often each label (a row of the table) was taken for each label (a column)."""
    table = np.zeros((len(seen.labels), len(seen.labels)), dtype=int)
    np.add.at(table, (np.asarray(seen.truth), np.asarray(seen.choice)), 1)
    counts: list[list[int]] = table.tolist()
    return counts
