"""`peftctl data`: what the model will see of a recipe's rows, what of it is trained, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peftctl import recipe as recipes
from peftctl.data.batches import Part
from peftctl.data.checks import Check, of_figures, of_leaks, of_padding, of_repeats
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.formats import Chat, Pair, Parsed
from peftctl.data.inspection import census, chosen, lengths_of, padding_of
from peftctl.data.renderings import Spelled, of_rendering, of_spelling, of_template
from peftctl.data.template import find, render
from peftctl.data.visible import visible
from peftctl.errors import DataError, Problem
from peftctl.models.base import load_tokenizer
from peftctl.models.source import local
from peftctl.recipe import Recipe
from peftctl.verbs.events import Listen, silent, speaker
from peftctl.verbs.rows import HERE
from peftctl.verbs.sets import TRAIN, Looked, eval_names, kind_of, name_of, read_sets, refused
from peftctl.verbs.signalled import EVERY, SLOW

COMPARED = 100
"""Rows that are rendered and tokenised anew, spread over the set; of those that spell special tokens, twice as many."""

WORST = {"ok": 0, "warning": 1, "failed": 2}


def data(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    rows: int = 4,
    set: str = TRAIN,
    listen: Listen = silent,
) -> dict[str, Any]:
    """Look at the rows of a recipe; nothing is trained and no weights are read.

    Args:
        recipe: a Recipe, the path of a recipe file, the name of a bundled one, or its content as a mapping.
        rows: how many sample rows to show: the first, the longest, one that was cut, others spread over the set.
        set: `train`, `eval`, or the name of a set of evaluation rows.

    Returns:
        `ok`; `checks`, each with `name`, `state` (`ok`, `warning`, `failed`), `text`, `hint` and `places`; `samples`,
        each with `place`, `tokens`, `trained` and `text`, its tokens in order as `ids`, `text`, `trained` and
        `special`; `ledger`, `lengths` and `padding`; figures and names of what prepared them.

    Raises:
        PeftctlError: the recipe, the tokenizer, or data that cannot be read at all.
    """
    recipe = recipes.coerce(recipe)
    name, say = name_of(set, recipe), speaker(listen)
    tokenizer: Any = load_tokenizer(recipe.model, say=say)

    def progress(what: str, done: int, total: int) -> None:
        if total > SLOW and done % EVERY == 0:
            listen({"event": "progress", "what": what, "done": done, "total": total})

    sets = read_sets(recipe, eval_names(recipe) if name == TRAIN else [name], tokenizer, say, progress)
    looked = sets.get(name) or sets[TRAIN]
    for key, each in sets.items():
        stops = each.prepared.stop_ids if each.prepared else ()
        tick = partial(progress, f"looking at `{key}`")
        each.census = census(each.rows, tokenizer, stops, recipe.dataset.train_on, tick)

    prepared = looked.prepared
    encoder = encoder_of(recipe, looked, tokenizer)
    checks = refusals(sets)
    if prepared is not None:
        checks += checked(recipe, name, sets, encoder)
    picked = chosen(looked.census, rows)
    looked.load(looked.census.origins[number] for number in picked)
    samples = [sample(looked, number, why, tokenizer) for number, why in picked.items()]
    found = refused(looked, recipe.dataset) if rows else None
    if found is not None and (shown := unusable(*found, encoder)):
        samples.append(shown)
    settled = worst(checks)
    return {
        "set": name,
        "ok": all(check.state != "failed" for check in settled),
        "model": recipe.model.name_or_path,
        "formats": sorted({*prepared.formats}) if prepared else [],
        "chat_template": recipe.dataset.chat_template if encoder.template is not None else None,
        "train_on": recipe.dataset.train_on,
        "stop_tokens": [token(id, tokenizer) for id in prepared.stop_ids] if prepared else [],
        "pad_token": token(tokenizer.pad_token_id, tokenizer),
        "ledger": asdict(prepared.ledger) if prepared else None,
        "rows": len(looked.rows),
        "tokens": looked.census.tokens,
        "trained_tokens": looked.census.trained_tokens,
        "lengths": lengths_of(looked.census, recipe.dataset.max_length) if looked.rows else None,
        "padding": padding(recipe, looked) if prepared else None,
        "checks": [asdict(check) for check in settled],
        "samples": samples,
    }


def checked(recipe: Recipe, name: str, sets: Mapping[str, Looked], encoder: Encoder) -> list[Check]:
    """Everything that can be wrong with the usable rows of a set."""
    looked, tokenizer = sets[name], encoder.tokenizer
    found, parsed, places = looked.census, looked.parsed, looked.places
    assert looked.prepared is not None
    stops = looked.prepared.stop_ids
    few = spread(len(parsed), COMPARED)
    spelling = Spelled(encoder)
    spelled = [number for number, row in enumerate(parsed) if spelling.in_row(row)]
    looked.load([*few, *spelled[: 2 * COMPARED], *(found.origins[row] for row in found.worth_telling())])
    compared = [(parsed[row], pieces_of(looked, row)) for row in sorted({*few, *spelled[:COMPARED]})]
    longest = max(looked.rows, key=len)
    own = None
    with suppress(DataError):
        own = find("tokenizer", tokenizer, HERE, lambda line: None)
    checks = of_figures(found, places, recipe.dataset.max_length)
    checks += [
        of_template([parsed[row] for row in few], encoder, own),
        of_rendering(compared, encoder),
        of_spelling([parsed[row] for row in spelled[: 2 * COMPARED]], len(spelled), encoder),
        of_padding(found, [*(looked.rows[i] for i in spread(len(looked.rows), 7)), longest], tokenizer, stops, places),
        generation_stops(recipe, stops, tokenizer),
        of_repeats(found, name, places),
    ]
    held = {key: each for key, each in sets.items() if key != TRAIN and each.prepared}
    leaks = of_leaks(
        sets[TRAIN].census,
        {key: each.census for key, each in held.items()},
        {key: each.places for key, each in sets.items()},
    )
    return [*checks, *leaks]


def refusals(sets: Mapping[str, Looked]) -> list[Check]:
    """Rows for which training would stop, as checks that failed."""
    checks = []
    for key, looked in sets.items():
        kinds: dict[str, list[Problem]] = {}
        for problem in looked.problems:
            kinds.setdefault(kind_of(problem) or "usable rows", []).append(problem)
        for name, problems in kinds.items():
            texts = [problem.text for problem in problems]
            what = f"training refuses `{key}`, beginning with"
            checks.append(Check(name=name, state="failed", text=what, hint=problems[0].hint, places=tuple(texts[:3])))
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


def encoder_of(recipe: Recipe, looked: Looked, tokenizer: Any) -> Encoder:
    """The encoder that prepared the rows, or would have."""
    template = looked.prepared.chat_template if looked.prepared else None
    if looked.prepared is None:
        template = find(recipe.dataset.chat_template, tokenizer, HERE, lambda line: None)
    return Encoder.of(recipe.dataset, tokenizer, template)


def padding(recipe: Recipe, looked: Looked) -> dict[str, float]:
    """Share of a batch that would be padding, padded and packed."""
    whole = looked.prepared is not None and sum(part.rows for part in looked.prepared.parts) == len(looked.rows)
    parts = looked.prepared.parts if looked.prepared and whole else [Part(len(looked.rows))]
    trainer = recipe.trainer
    return padding_of(looked.census.lengths, parts, trainer.batch_size, trainer.micro_batch_size, recipe.seed)


def spread(rows: int, most: int) -> list[int]:
    """At most so many of that many rows, at equal distances."""
    return sorted({round(i * (rows - 1) / max(most - 1, 1)) for i in range(most)}) if rows else []


def pieces_of(looked: Looked, row: int) -> list[Encoded]:
    """What a row of the data became."""
    origins = np.asarray(looked.census.origins)
    start, end = np.searchsorted(origins, [row, row + 1])
    return [looked.rows[i] for i in range(start, end)]


def sample(looked: Looked, number: int, why: str, tokenizer: Any) -> dict[str, Any]:
    """One row, token by token."""
    row = looked.rows[number]
    text = visible(row.input_ids, row.spans, tokenizer)
    return {
        "row": number,
        "place": looked.places(looked.census, [number])[0],
        "why": why,
        "tokens": len(row),
        "trained": row.trained,
        "cut": row.cut,
        "problem": None,
        "text": [each._asdict() for each in text],
    }


def unusable(row: Parsed, problem: Problem, encoder: Encoder) -> dict[str, Any] | None:
    """A row that cannot be trained, as far as it can be rendered: what it looks like tells why."""
    try:
        if isinstance(row, Chat):
            chat = encoder.with_system(row)
            text = render(chat.messages, encoder.tokenizer, encoder.template or "", chat.place, tools=chat.tools)
        else:
            text = row.prompt + row.completion if isinstance(row, Pair) else row.text
    except DataError:
        return None
    tokenizer: Any = encoder.tokenizer
    ids = tokenizer(text, add_special_tokens=not isinstance(row, Chat), verbose=False)["input_ids"]
    return {
        "row": None,
        "place": row.place,
        "why": "refused",
        "tokens": len(ids),
        "trained": 0,
        "cut": 0,
        "problem": problem.text.removeprefix(f"{row.place}: "),
        "text": [each._asdict() for each in visible(ids, (), tokenizer)],
    }


def token(id: int, tokenizer: Any) -> dict[str, Any]:
    """A token by its id."""
    return {"id": id, "text": tokenizer.convert_ids_to_tokens(id)}
