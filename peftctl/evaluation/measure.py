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
    rows: Sequence[Example | None],
    encoder: RowEncoder,
    evaluation: Evaluation,
    pad_id: int,
    tick: Tick = lambda done, total: None,
    rejected: Sequence[Example | None] = (),
) -> Seen:
    """What the wanted metrics read of `model` and `rows`, in the order of `rows`; `rejected` are their worse answers.

    None stands for an answer that a row has not, whose numbers are zero. Raises DataError when a row's answer is none
    of `labels`, when no row has an answer at all, or there are no rows.
    """
    if not rows:
        raise DataError("dataset.eval: no row is left to evaluate", "look at `max_length` and `on_long`")
    tagged = evaluation.needs("tags")
    wanted = evaluation.needs("truth") or tagged or rejected
    truth = [encoder.encode(row) if row else [] for row in rows] if wanted else []
    worse = [encoder.encode(row) if row else [] for row in rejected]
    choices = labelled(rows, encoder, evaluation.labels) if evaluation.needs("labels") else []
    sequences = [*(piece for row in (*truth, *worse) for piece in row), *(one for group in choices for one in group)]
    scores = score(model, task, sequences, evaluation.batch_size, pad_id, tick) if sequences else {}
    seen, answers = Seen(labels=evaluation.labels), [answer(row) if row else None for row in rows]
    if truth:
        found = [[scores[key(piece)] for piece in row] for row in truth]
        seen = replace(
            seen,
            nats=np.array([sum(one.nats for one in row) for row in found], dtype=np.float64),
            right=np.array([sum(one.right for one in row) for row in found], dtype=np.float64),
            tokens=np.array([sum(piece.trained for piece in row) for row in truth], dtype=np.float64),
        )
    if tagged:
        names = task.head.labels
        tags = [[names[n] for piece in row for n in piece.ids[-piece.trained :]] for row in truth]
        put = [[names[n] for piece in row for n in scores[key(piece)].first] for row in truth]
        seen = replace(seen, tags=tags, found=put)
    if worse:
        seen = replace(
            seen,
            rejected=np.array([sum(scores[key(piece)].nats for piece in row) for row in worse], dtype=np.float64),
            rejected_tokens=np.array([sum(piece.trained for piece in row) for row in worse], dtype=np.float64),
        )
    if choices:
        best = [min(range(len(group)), key=lambda i: scores[key(group[i])].nats) for group in choices]
        seen = replace(seen, choice=best, truth=[evaluation.labels.index(right or "") for right in answers])
    said = spoken(model, rows, encoder, evaluation, tick) if "text" in task.measures else [None] * len(rows)
    return replace(seen, answers=answers, said=said)


def labelled(rows: Sequence[Example | None], encoder: RowEncoder, labels: Sequence[str]) -> list[list[Encoded]]:
    """Every row with each label as its answer. Raises DataError where a row's own answer is none of them."""
    given = [row for row in rows if row]
    if len(given) < len(rows):
        raise DataError("dataset.eval: answers that were judged are not compared with labels", "remove `labels`")
    choices = [[answered(row, label) for label in labels] for row in given]
    check_answers(given, labels)
    whole = any_begins_another(labels)
    return [[encoder.compared(choice, whole) for choice in group] for group in choices]


def spoken(
    model: nn.Module, rows: Sequence[Example | None], encoder: RowEncoder, evaluation: Evaluation, tick: Tick
) -> list[str | None]:
    """The generated answers, of all rows or of the first `samples`; None where there is none."""
    most = len(rows) if evaluation.needs("text") else evaluation.samples
    asked = [i for i, row in enumerate(rows) if row and answer(row) is not None][:most]
    if most and not asked:
        why = f"{rows[0].place}: plain text has no answer" if rows[0] else "dataset.eval: no row has a good answer"
        raise DataError(f"{why} to generate", "remove what generates answers")
    said: list[str | None] = [None] * len(rows)
    if asked:
        given = [row for i in asked if (row := rows[i])]
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
