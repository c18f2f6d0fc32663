"""What a command line asks `eval` to measure, instead of what the recipe says."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftctl.config.near import did_you_mean
from peftctl.data.dataset import ONLY, SET_NAME, Source, Sources, Split
from peftctl.errors import Problem, RecipeError
from peftctl.evaluation.evaluation import CONFUSION, Evaluation
from peftctl.evaluation.gate import split_key
from peftctl.evaluation.metrics import METRICS
from peftctl.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of `peftctl eval`; what is None or empty leaves the recipe as it is."""

    data: Sequence[str] = ()
    """Rows to measure on instead of `dataset.eval`: `PATH`, or `NAME=PATH`."""
    metrics: Sequence[str] = ()
    labels: Sequence[str] = ()
    set: str | None = None
    """The one eval set to measure."""
    max_rows: int | None = None

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe as it is asked for. Raises RecipeError for what cannot be."""
        if self.data:
            recipe = replace(recipe, dataset=replace(recipe.dataset, eval=named(self.data)))
        sets = recipe.dataset.eval_sets
        if self.set is not None:
            if self.set not in sets or self.set == ONLY:
                names = [name for name in sets if name]
                hint = did_you_mean(self.set, names) or f"sets: {', '.join(names) or 'none with a name'}"
                raise RecipeError(f"`--set {self.set}`: no evaluation rows have that name", hint)
            recipe = replace(recipe, dataset=replace(recipe.dataset, eval={self.set: sets[self.set]}))
        known = (*METRICS, CONFUSION)
        wrong = [
            Problem(f"`{name}`: no such metric", did_you_mean(name, known) or f"metrics: {', '.join(known)}")
            for name in self.metrics
            if name not in known
        ]
        if wrong:
            raise RecipeError.of(wrong)
        try:
            evaluation: Evaluation = replace(
                recipe.eval,
                metrics=list(self.metrics) or recipe.eval.metrics,
                labels=list(self.labels or recipe.eval.labels),
                gates={key: gate for key, gate in recipe.eval.gates.items() if self.judges(key)},
                max_rows=self.max_rows or recipe.eval.max_rows,
            )
        except ValueError as error:
            text, _, hint = str(error).partition("; hint: ")
            raise RecipeError(text, hint or None) from None
        told = [(text, hint) for _, text, hint in evaluation.unmeasurable(recipe.trainer.task)]
        if told:
            either = [(text, f"{hint}, or `--labels`" if "labels:" in hint else hint) for text, hint in told]
            raise RecipeError.of([Problem(*each) for each in either])
        return replace(recipe, eval=evaluation)

    def judges(self, key: str) -> bool:
        """Whether the recipe's gate `key` is judged: where metrics are named, only gates of those are."""
        return not self.metrics or split_key(key)[1] in self.metrics


def named(words: Iterable[str]) -> Sources | dict[str, Sources]:
    """`PATH` and `NAME=PATH` words as sources, by name where they have names. Raises RecipeError where only some do."""
    sets: dict[str, list[str | Source]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists() or not SET_NAME.fullmatch(name):
            name, path = ONLY, word
        sets.setdefault(name, []).append(path)
    if ONLY not in sets:
        found: dict[str, Sources] = {}
        found.update(sets)
        return found
    if len(sets) > 1:
        raise RecipeError("`--data`: some of the rows have a name and some have none", "write `NAME=PATH` for all")
    return sets[ONLY]


def command(recipe: Recipe, folder: str) -> str:
    """The command that measures the run in `folder` as this recipe is measured."""
    words = ["peftctl", "eval", folder]
    for name, spec in recipe.dataset.eval_sets.items():
        for source in spec if isinstance(spec, list) else [spec]:
            path = source if isinstance(source, str) else source.path
            words += ["--data", f"{name}={path}" if name else path]
    words += ["--metrics", ",".join(metric.name for metric in recipe.eval.wanted)]
    words += ["--labels", ",".join(recipe.eval.labels)] if recipe.eval.labels else []
    words += ["--max-rows", str(recipe.eval.max_rows)] if recipe.eval.max_rows else []
    return shlex.join(words)


def unmeasured_gates(recipe: Recipe) -> list[str]:
    """The gates that name an eval set which is not measured."""
    sets = {ONLY} if isinstance(recipe.dataset.eval, Split) else set(recipe.dataset.eval_sets)
    return [key for key in recipe.eval.gates if split_key(key)[0] not in (None, *sets)]


def settings(evaluation: Evaluation) -> dict[str, object]:
    """What figures depend on beside model and rows."""
    signed = {metric.name: metric.signature() for metric in evaluation.wanted if metric.signature}
    return {
        "labels": evaluation.labels,
        "max_rows": evaluation.max_rows,
        "batch_size": evaluation.batch_size,
        "max_new_tokens": evaluation.max_new_tokens,
        "signatures": signed,
    }
