"""The rows of a recipe, prepared for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from peftctl.data.dataset import ONLY, Split
from peftctl.data.encode import Encoded
from peftctl.data.examples import readable
from peftctl.data.formats import Example, Feedback, Preference
from peftctl.data.held_out import hold_out
from peftctl.data.preferred import judged_answers
from peftctl.data.prepare import Prepared, prepare
from peftctl.data.reading import RowEncoder
from peftctl.data.survey import Meter, silent
from peftctl.errors import DataError
from peftctl.models.adapted import classes_of
from peftctl.models.base import load_tokenizer
from peftctl.models.positions import positions
from peftctl.models.source import local
from peftctl.recipe import Recipe
from peftctl.tasks import Task
from peftctl.tasks.kto import ANSWERS
from peftctl.tasks.preference import PAIRS

HERE = Path(".")
"""Where relative paths start: reading a recipe has made its paths relative to the working directory."""


@dataclass(frozen=True)
class Rows:
    """Training rows, and the recipe's sets of evaluation rows by name, the first `eval.max_rows` of each."""

    train: Prepared
    eval: dict[str, Prepared]
    task: Task
    """The recipe's, with what it takes from the training rows."""

    @classmethod
    def read(cls, recipe: Recipe, say: Callable[[str], None], progress: Meter = silent) -> Rows:
        """Read, check and encode everything. Raises DataError with all that is wrong, and what `progress` raises."""
        dataset, most, task = recipe.dataset, recipe.eval.max_rows, recipe.trainer.task
        tokenizer = load_tokenizer(recipe.model, say=say, head=task.head)
        task = knowing(recipe, say)
        ready = partial(
            prepare,
            dataset=dataset,
            tokenizer=tokenizer,
            root=HERE,
            say=say,
            progress=progress,
            reading=task.reading,
            keep_parsed=task.needs_parsed,
        )
        train = ready(dataset.train)
        if isinstance(dataset.eval, Split):
            train, held_out = hold_out(train, dataset.eval.split, recipe.seed)
            return cls(train, {ONLY: first(held_out, most)}, task)
        sets = {name: ready(spec) for name, spec in dataset.eval_sets.items()}
        return cls(train, {name: first(rows, most) for name, rows in sets.items()}, task)

    @property
    def eval_rows(self) -> dict[str, Sequence[Encoded]]:
        """What the loss is measured on while training, by set."""
        return {name: part.rows for name, part in self.eval.items()}

    def digests(self) -> dict[str, Any]:
        """Hashes that differ when the data does."""
        found = {name: part.digest for name, part in self.eval.items()}
        return {"train": self.train.digest, "eval": found.get(ONLY) if set(found) <= {ONLY} else found}

    def counts(self) -> dict[str, Any]:
        """Where the rows went, for training and evaluation."""
        parts = {"train": self.train, **{f"eval/{name}".rstrip("/"): part for name, part in self.eval.items()}}
        return {
            name: {**asdict(part.ledger), "sources": {path: asdict(ledger) for path, ledger in part.sources.items()}}
            for name, part in parts.items()
        }


def knowing(recipe: Recipe, say: Callable[[str], None]) -> Task:
    """The recipe's task with what it takes from the training rows, and from the base."""
    dataset, model, task = recipe.dataset, recipe.model, recipe.trainer.task
    rows = partial(readable, dataset.train, dataset, HERE, task.accept)
    known: Task = task.knowing(rows, say, lambda: classes_of(local(model.name_or_path, model.revision, weights=False)))
    return known


class EvalSet(NamedTuple):
    """Rows to measure on, and how they are encoded."""

    prepared: Prepared
    encoder: RowEncoder
    rows: Sequence[Example | None]
    """The rows as they are measured, None for one that has a bad answer alone."""
    rejected: Sequence[Example | None] = ()
    """The same with their worse answers, where good and bad ones are compared."""
    encoded: Sequence[Encoded] = ()
    """The prepared rows as the task has them: with their pictures, where it has some."""


def evaluation_rows(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> dict[str, EvalSet]:
    """The rows to measure on, by the name of their set. Raises DataError when there are none."""
    dataset, task = recipe.dataset, recipe.trainer.task
    if dataset.eval is None:
        raise DataError("dataset.eval: nothing to evaluate on", "name a file, `eval: {split: 0.05}`, or `--data FILE`")
    reading = PAIRS if recipe.eval.needs("pairs") else ANSWERS if recipe.eval.needs("feedback") else task.reading
    if reading != task.reading and isinstance(dataset.eval, Split) and task.reading not in (PAIRS, ANSWERS):
        hint = "name a file of them, or `--data FILE`"
        raise DataError("dataset.eval: rows to train on have one answer each, and two are compared", hint)
    ready = partial(prepare, dataset=dataset, tokenizer=tokenizer, root=HERE, say=say, keep_parsed=True)
    if isinstance(dataset.eval, Split):
        sets = {ONLY: hold_out(ready(dataset.train, reading=reading), dataset.eval.split, recipe.seed)[1]}
    else:
        sets = {name: ready(spec, reading=reading) for name, spec in dataset.eval_sets.items()}
    return {name: eval_set(first(rows, recipe.eval.max_rows), recipe, tokenizer) for name, rows in sets.items()}


def eval_set(prepared: Prepared, recipe: Recipe, tokenizer: Any) -> EvalSet:
    """The rows, with an encoder that knows what ends their answers before it has encoded any."""
    encoder = recipe.trainer.task.judged.encoder(recipe.dataset, tokenizer, prepared.chat_template)
    encoder.stop_ids.update(prepared.stop_ids)
    rows = prepared.parsed
    if not any(isinstance(row, Preference | Feedback) for row in rows):
        return EvalSet(prepared, encoder, rows)
    found = [{good: answer for answer, good in judged_answers(row)} for row in rows]
    return EvalSet(prepared, encoder, [one.get(True) for one in found], [one.get(False) for one in found])


def refuse_longer(sets: Iterable[Prepared], task: Task, model: nn.Module, virtual: int = 0) -> None:
    """Raise DataError for rows that `model` has no positions for, `virtual` tokens before each included."""
    limit = positions(model)
    if limit is None:
        return
    widest = virtual
    for prepared in sets:
        for number in np.flatnonzero(prepared.rows.lengths + virtual > limit):
            batch = task.collate([prepared.rows[int(number)]], 0)
            texts = [tensor for name, tensor in batch.items() if name in ("input_ids", "labels")]
            read = [text.shape[1] for text in texts if text.dim() > 1]
            widest = max(widest, *(length + virtual for length in read))
    if widest > limit:
        text = f"dataset.max_length: the longest row has {widest:,} tokens, and {type(model).__name__} reads {limit:,}"
        raise DataError(text, f"set `max_length: {limit - virtual}`; `on_long` says what becomes of longer rows")


def first(prepared: Prepared, rows: int | None) -> Prepared:
    """The first so many rows, with all their pieces; all of them for None."""
    starts = prepared.rows.firsts
    if rows is None or rows >= len(starts):
        return prepared
    return replace(prepared, rows=prepared.rows[: int(starts[rows])], parsed=prepared.parsed[:rows])
