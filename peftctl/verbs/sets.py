"""The sets of rows of a recipe to be looked at: one that training would refuse is read as far as it can be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from peftctl.config.near import did_you_mean
from peftctl.data.dataset import Sources, Split
from peftctl.data.encode import NEVER_STOPS, TRAINS_NOTHING
from peftctl.data.examples import examples, format_of
from peftctl.data.fitting import NOTHING_LEFT, Encoded
from peftctl.data.formats import Chat, Pair, Parsed, Text
from peftctl.data.held_out import hold_out
from peftctl.data.inspection import Census
from peftctl.data.mistakes import Mistakes
from peftctl.data.prepare import Prepared, prepare
from peftctl.data.sources import listed
from peftctl.data.survey import Meter, silent
from peftctl.data.texts import Texts
from peftctl.errors import DataError, Problem, RecipeError
from peftctl.models.quiet import Say
from peftctl.recipe import Recipe
from peftctl.verbs.rows import HERE, first

TRAIN = "train"
EVAL = "eval"
"""What evaluation rows without a name are called."""

UNUSABLE = "usable rows"
"""The check of rows that cannot even be read, or of which too many were left out."""


@dataclass(kw_only=True)
class Looked:
    """A set of rows, what is wrong with those that cannot be used, and the figures of the others."""

    spec: Sources
    prepared: Prepared | None
    """None when no row can be used."""

    problems: Sequence[Problem] = ()
    """Why training would refuse the set."""

    census: Census = field(default_factory=Census)

    @property
    def rows(self) -> Sequence[Encoded]:
        return self.prepared.rows if self.prepared else ()

    @property
    def parsed(self) -> Sequence[Parsed]:
        return cast(Sequence[Parsed], self.prepared.parsed) if self.prepared else ()

    def load(self, numbers: Iterable[int]) -> None:
        """Reads the texts of these rows in one pass, where they are not in memory."""
        if isinstance(self.parsed, Texts):
            self.parsed.load(numbers)

    def places(self, found: Census, numbers: Sequence[int]) -> list[str]:
        """`file:line` of rows, and which piece of it where a row was split."""
        self.load([found.origins[number] for number in numbers])
        places = []
        for number in numbers:
            row = self.rows[number]
            piece = f" (piece {row.piece + 1} of {row.pieces})" if row.pieces > 1 else ""
            places.append(f"{self.parsed[found.origins[number]].place}{piece}")
        return places


def name_of(wanted: str, recipe: Recipe) -> str:
    """The name of the set that a command line means. Raises RecipeError when there is none."""
    names = [TRAIN, *eval_names(recipe)]
    if wanted in names:
        return wanted
    if wanted == EVAL and len(names) == 2:
        return names[1]
    hint = did_you_mean(wanted, names) or f"sets: {', '.join(f'`{name}`' for name in names)}"
    raise RecipeError(f"`--set {wanted}`: the recipe has no rows of that name", hint)


def eval_names(recipe: Recipe) -> list[str]:
    """The names of the sets of evaluation rows."""
    dataset = recipe.dataset
    return [EVAL] if isinstance(dataset.eval, Split) else [name or EVAL for name in dataset.eval_sets]


def read_sets(recipe: Recipe, wanted: str, tokenizer: Any, say: Say, progress: Meter = silent) -> dict[str, Looked]:
    """The set `wanted` and those it is compared with: the training rows, and for these all others.

    Raises DataError when `wanted` cannot be read at all; of the others that is a problem among theirs.
    """
    dataset, most = recipe.dataset, recipe.eval.max_rows

    def looked_at(name: str, spec: Sources) -> Looked:
        try:
            return look(spec, recipe, tokenizer, say, progress)
        except DataError as error:
            if name == wanted or isinstance(dataset.eval, Split):
                raise
            return Looked(spec=spec, prepared=None, problems=error.problems)

    found = {TRAIN: looked_at(TRAIN, dataset.train)}
    whole = found[TRAIN].prepared
    if isinstance(dataset.eval, Split) and whole is not None:
        found[TRAIN].prepared, held_out = hold_out(whole, dataset.eval.split, recipe.seed)
        found[EVAL] = Looked(spec=dataset.train, prepared=first(held_out, most))
    for key, spec in dataset.eval_sets.items():
        if wanted in (TRAIN, name := key or EVAL):
            found[name] = looked_at(name, spec)
            found[name].prepared = (rows := found[name].prepared) and first(rows, most)
    return found


def look(spec: Sources, recipe: Recipe, tokenizer: Any, say: Say, progress: Meter) -> Looked:
    """The rows of `spec` as training would have them; where it would refuse, those that can be used."""
    dataset, task = recipe.dataset, recipe.trainer.task
    ready = partial(prepare, spec, tokenizer=tokenizer, root=HERE, progress=progress, reading=task.reading)
    try:
        prepared = ready(dataset=dataset, say=say)
    except DataError as error:
        refused = error
    else:
        if prepared.ledger.kept == prepared.ledger.read:
            texts = Texts(spec, prepared.formats, dataset, HERE, prepared.ledger.kept, task.accept)
            return Looked(spec=spec, prepared=replace(prepared, parsed=texts))
        # which of the rows that can be read were kept, only preparing them tells
        return Looked(spec=spec, prepared=ready(dataset=dataset, keep_parsed=True))
    lenient = replace(dataset, on_bad_row="skip", max_skipped=1.0)
    try:
        prepared = ready(dataset=lenient, keep_parsed=True)
    except DataError as error:
        if not error.problems[-1].text.startswith("no row is left"):
            raise refused from None
        return Looked(spec=spec, prepared=None, problems=refused.problems)
    return Looked(spec=spec, prepared=prepared, problems=refused.problems)


def refused(looked: Looked, recipe: Recipe) -> tuple[Parsed, Problem] | None:
    """The first row that can be read and cannot be trained, and why."""
    told = [problem for problem in looked.problems if kind_of(problem) != UNUSABLE]
    if not told:
        return None
    dataset, accept = recipe.dataset, recipe.trainer.task.accept
    for source in listed(looked.spec):
        with suppress(DataError):
            format = format_of(source, dataset, HERE, lambda line: None, Mistakes())
            for item in examples(source, format, dataset, HERE, accept=accept) if format else ():
                if isinstance(item, Chat | Pair | Text) and told[0].text.startswith(f"{item.place}: "):
                    return item, told[0]
    return None


def kind_of(problem: Problem) -> str:
    """Which check a row that cannot be used fails."""
    if problem.text.endswith(f": {NEVER_STOPS}"):
        return "stop tokens"
    if problem.text.endswith(f": {TRAINS_NOTHING}") or f": {NOTHING_LEFT} in " in problem.text:
        return "trained rows"
    return UNUSABLE


def refused_rows(looked: Looked, kind: str) -> str:
    """How many rows of a set fail a check: `2 of 9 rows`, or nothing where that is not known."""
    if looked.prepared is None:
        return "every row"
    ledger = looked.prepared.ledger
    rows = sum(number for why, number in ledger.reasons.items() if kind_of(Problem(f": {why}")) == kind)
    return f"{rows:,} of {ledger.read:,} rows" if rows else ""
