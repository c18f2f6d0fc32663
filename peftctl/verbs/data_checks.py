"""Everything that `peftctl data` looks for: in the figures of rows, in their texts, and in what training refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from peftctl.data.checks import Check, of_figures, of_leaks, of_padding, of_repeats
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.inspection import SHOWN
from peftctl.data.renderings import Spelled, of_rendering, of_spelling, of_template
from peftctl.data.template import find
from peftctl.errors import DataError, Problem
from peftctl.models.head import DIFFUSION
from peftctl.models.source import local
from peftctl.recipe import Recipe
from peftctl.verbs.rows import HERE
from peftctl.verbs.sets import TRAIN, Looked, kind_of, refused_rows

COMPARED = 100
"""Rows that are rendered and tokenised anew, spread over the set; of those that spell special tokens, twice as many."""

WORST = {"ok": 0, "warning": 1, "failed": 2}


def checked(
    recipe: Recipe, name: str, sets: Mapping[str, Looked], tokenizer: Any, encoder: Encoder | None
) -> list[Check]:
    """Everything that can be wrong with the usable rows of a set; with an `encoder` also of how texts were rendered."""
    looked, task = sets[name], recipe.trainer.task
    found, places = looked.census, looked.places
    assert looked.prepared is not None
    looked.load(found.origins[row] for row in found.worth_telling())
    checks = of_figures(found, places, recipe.dataset.max_length)
    if encoder is not None:
        checks += of_texts(looked, encoder)
    if task.head is DIFFUSION:  # a row is its picture, which is looked at where rows are read
        return [check for check in checks if check.name == "unknown characters"]
    if task.head.classifies:
        checks = [check for check in checks if check.name in ("lengths", "unknown characters")]
    else:
        checks.append(generation_stops(recipe, looked.prepared.stop_ids, tokenizer))
    held = {key: each for key, each in sets.items() if key != TRAIN and each.prepared}
    leaks = of_leaks(
        sets[TRAIN].census,
        {key: each.census for key, each in held.items()},
        {key: each.places for key, each in sets.items()},
    )
    return [*checks, of_repeats(found, name, places), *leaks]


def of_texts(looked: Looked, encoder: Encoder) -> list[Check]:
    """What can be wrong with how conversations and texts were rendered and tokenised, and are padded."""
    found, parsed, tokenizer = looked.census, looked.parsed, encoder.tokenizer
    assert looked.prepared is not None
    stops = looked.prepared.stop_ids
    few = spread(len(parsed), COMPARED)
    spelling = Spelled(encoder)
    spelled = [number for number, row in enumerate(parsed) if spelling.in_row(row)]
    looked.load([*few, *spelled[: 2 * COMPARED]])
    compared = [(parsed[row], pieces_of(looked, row)) for row in sorted({*few, *spelled[:COMPARED]})]
    longest = max(looked.rows, key=len)
    own = None
    with suppress(DataError):
        own = find("tokenizer", tokenizer, HERE, lambda line: None)
    return [
        of_template([parsed[row] for row in few], encoder, own),
        of_rendering(compared, encoder),
        of_spelling([parsed[row] for row in spelled[: 2 * COMPARED]], len(spelled), encoder),
        of_padding(
            found, [*(looked.rows[i] for i in spread(len(looked.rows), 7)), longest], tokenizer, stops, looked.places
        ),
    ]


def refusals(sets: Mapping[str, Looked]) -> list[Check]:
    """Rows for which training would stop, as checks that failed."""
    checks = []
    for key, looked in sets.items():
        kinds: dict[str, list[Problem]] = {}
        for problem in looked.problems:
            kinds.setdefault(kind_of(problem), []).append(problem)
        for name, problems in kinds.items():
            told = [problem for problem in problems if not problem.text.startswith("...")]
            if told or len(kinds) == 1:
                rows = refused_rows(looked, name)
                what = f"training refuses {rows} of `{key}`" if rows else f"training refuses `{key}`"
                places = tuple(problem.text for problem in (told or problems)[:SHOWN])
                hint = next((problem.hint for problem in told if problem.hint), None)
                checks.append(Check(name=name, state="failed", text=what, hint=hint, places=places))
    return checks or [Check(name="usable rows", state="ok", text="training takes them as they are")]


def worst(checks: Sequence[Check]) -> list[Check]:
    """The checks in their order; of those with one name only what is wrong, if anything is."""
    states: dict[str, int] = {}
    for check in checks:
        states[check.name] = max(states.get(check.name, 0), WORST[check.state])
    return [check for check in checks if WORST[check.state] == states[check.name] or check.state == "failed"]


def generation_stops(recipe: Recipe, stops: Sequence[int], tokenizer: Any) -> Check:
    """Whether whoever generates with the files of the base stops where answers are taught to end."""
    name, known = "generation", {tokenizer.eos_token_id}
    folder = local(recipe.model.name_or_path, recipe.model.revision, root=HERE, weights=False)
    for file in ("generation_config.json", "config.json"):
        with suppress(OSError, ValueError):
            ids = json.loads((folder / file).read_bytes()).get("eos_token_id")
            known |= {*ids} if isinstance(ids, list) else {ids}
    missed = [id for id in stops if id not in known]
    names = ", ".join(f"`{token(id, tokenizer)['text']}`" for id in missed or stops)
    if not missed:
        return Check(name=name, state="ok", text=f"answers end with {names}, where generation stops")
    text = f"answers end with {names}, which the files of the base do not stop at"
    hint = f"peftctl stops there; tell other programs: `eos_token_id` {', '.join(map(str, missed))}"
    return Check(name=name, state="warning", text=text, hint=hint)


def spread(rows: int, most: int) -> list[int]:
    """At most so many of that many rows, at equal distances."""
    return sorted({round(i * (rows - 1) / max(most - 1, 1)) for i in range(most)}) if rows else []


def pieces_of(looked: Looked, row: int) -> list[Encoded]:
    """What a row of the data became."""
    origins = np.asarray(looked.census.origins)
    start, end = np.searchsorted(origins, [row, row + 1])
    return [looked.rows[i] for i in range(start, end)]


def token(id: int, tokenizer: Any) -> dict[str, Any]:
    """A token by its id."""
    return {"id": id, "text": tokenizer.convert_ids_to_tokens(id)}
