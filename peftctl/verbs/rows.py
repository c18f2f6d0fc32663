"""The rows of a recipe, prepared for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.data.dataset import ONLY, Dataset, Sources, Split
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.formats import Parsed
from peftctl.data.held_out import hold_out
from peftctl.data.preferred import chosen, rejected
from peftctl.data.prepare import Prepared, prepare
from peftctl.data.survey import Meter, silent
from peftctl.errors import DataError
from peftctl.models.base import load_tokenizer
from peftctl.recipe import Recipe

HERE = Path(".")
"""Where relative paths start: reading a recipe has made its paths relative to the working directory."""


@dataclass(frozen=True)
class Rows:
    """Training rows, and the recipe's sets of evaluation rows by name, the first `eval.max_rows` of each."""

    train: Prepared
    eval: dict[str, Prepared]

    @classmethod
    def read(cls, recipe: Recipe, say: Callable[[str], None], progress: Meter = silent) -> Rows:
        """Read, check and encode everything. Raises DataError with all that is wrong, and what `progress` raises."""
        dataset, most = recipe.dataset, recipe.eval.max_rows
        tokenizer = load_tokenizer(recipe.model, say=say)
        ready = partial(prepare, dataset=dataset, tokenizer=tokenizer, root=HERE, say=say, progress=progress)
        train = ready(dataset.train)
        if isinstance(dataset.eval, Split):
            train, held_out = hold_out(train, dataset.eval.split, recipe.seed)
            return cls(train, {ONLY: first(held_out, most)})
        sets = {name: ready(spec) for name, spec in dataset.eval_sets.items()}
        return cls(train, {name: first(rows, most) for name, rows in sets.items()})

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


class EvalSet(NamedTuple):
    """Rows to measure on, as they were read, and how they are encoded."""

    prepared: Prepared
    encoder: Encoder
    rejected: Sequence[Parsed] = ()
    """The same rows with their worse answers, where two are compared."""

    @classmethod
    def of(cls, prepared: Prepared, dataset: Dataset, tokenizer: Any, rejected: Sequence[Parsed] = ()) -> EvalSet:
        """The rows, with an encoder that knows what ends their answers before it has encoded any."""
        encoder = Encoder.of(dataset, tokenizer, prepared.chat_template)
        encoder.stop_ids.update(prepared.stop_ids)
        return cls(prepared, encoder, rejected)


def evaluation_rows(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> dict[str, EvalSet]:
    """The rows to measure on, by the name of their set. Raises DataError when there are none."""
    dataset, most = recipe.dataset, recipe.eval.max_rows
    if dataset.eval is None:
        raise DataError("dataset.eval: nothing to evaluate on", "name a file, `eval: {split: 0.05}`, or `--data FILE`")
    ready = partial(prepare, dataset=dataset, tokenizer=tokenizer, root=HERE, keep_parsed=True)
    if recipe.eval.needs("pairs"):
        if isinstance(dataset.eval, Split):
            hint = "name a file of them, or `--data FILE`"
            raise DataError("dataset.eval: rows to train on have one answer each, and two are compared", hint)
        return {name: compared(spec, recipe, tokenizer, ready, say) for name, spec in dataset.eval_sets.items()}
    if isinstance(dataset.eval, Split):
        train = ready(dataset.train, say=say)
        sets = {ONLY: hold_out(train, dataset.eval.split, recipe.seed)[1]}
    else:
        specs = dataset.eval_sets.items()
        sets = {name: ready(spec, say=say) for name, spec in specs}
    return {name: EvalSet.of(first(rows, most), dataset, tokenizer) for name, rows in sets.items()}


def compared(
    spec: Sources, recipe: Recipe, tokenizer: Any, ready: Callable[..., Prepared], say: Callable[[str], None]
) -> EvalSet:
    """Rows of preferences, with their better and their worse answers. Raises DataError where one of two is left out."""
    most = recipe.eval.max_rows
    better, worse = first(ready(spec, say=say, accept=chosen), most), first(ready(spec, accept=rejected), most)
    places = {row.place for row in better.parsed} ^ {row.place for row in worse.parsed}
    if places:
        text = f"{min(places)}: of its two answers one is left out, so they cannot be compared"
        raise DataError(text, "raise `dataset.max_length`, or set `on_long: truncate`")
    return EvalSet.of(better, recipe.dataset, tokenizer, worse.parsed)


def first(prepared: Prepared, rows: int | None) -> Prepared:
    """The first so many rows, with all their pieces; all of them for None."""
    starts = prepared.rows.firsts
    if rows is None or rows >= len(starts):
        return prepared
    return replace(prepared, rows=prepared.rows[: int(starts[rows])], parsed=prepared.parsed[:rows])
