"""`peftctl data`: what the model will see of a recipe's rows, what of it is trained, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from peftctl import recipe as recipes
from peftctl.data.batches import Part
from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat, Pair, Parsed
from peftctl.data.inspection import census, chosen, lengths_of, padding_of
from peftctl.data.template import find, render
from peftctl.data.visible import visible
from peftctl.errors import DataError, Problem
from peftctl.models.base import load_tokenizer
from peftctl.recipe import Recipe
from peftctl.tasks import Task
from peftctl.tasks.sft import SFT
from peftctl.tasks.task import name_of as name_of_task
from peftctl.verbs.data_checks import checked, refusals, token, worst
from peftctl.verbs.events import Listen, silent, speaker
from peftctl.verbs.rows import HERE, knowing
from peftctl.verbs.sets import TRAIN, Looked, name_of, read_sets, refused
from peftctl.verbs.signalled import EVERY, SLOW


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
    tokenizer: Any = load_tokenizer(recipe.model, say=say, head=recipe.trainer.task.head)
    task = knowing(recipe, say)
    recipe = replace(recipe, trainer=replace(recipe.trainer, task=task))

    def progress(what: str, done: int, total: int) -> None:
        if total > SLOW and done % EVERY == 0:
            listen({"event": "progress", "what": what, "done": done, "total": total})

    sets = read_sets(recipe, name, tokenizer, say, progress)
    looked = sets.get(name) or sets[TRAIN]
    for key, each in sets.items():
        stops = each.prepared.stop_ids if each.prepared else ()
        tick = partial(progress, f"looking at `{key}`")
        legible = [task.legible(row)[0] for row in each.rows] if task != SFT() else each.rows
        each.census = census(legible, tokenizer, stops, recipe.dataset.train_on, tick)

    prepared = looked.prepared
    encoder = encoder_of(recipe, looked, tokenizer) if isinstance(task, SFT) else None
    checks = refusals(sets)
    if prepared is not None:
        checks += checked(recipe, name, sets, tokenizer, encoder)
    picked = chosen(looked.census, rows)
    looked.load(looked.census.origins[number] for number in picked)
    samples = [sample(looked, number, why, tokenizer, task) for number, why in picked.items()]
    template = encoder.template if encoder else prepared and prepared.chat_template
    found = refused(looked, recipe) if rows and encoder else None
    if found is not None and encoder is not None and (shown := unusable(*found, encoder)):
        samples.append(shown)
    settled = worst(checks)
    return {
        "set": name,
        "ok": all(check.state != "failed" for check in settled),
        "model": recipe.model.name_or_path,
        "task": name_of_task(task),
        "labels": list(task.head.labels),
        "formats": sorted({*prepared.formats}) if prepared else [],
        "chat_template": recipe.dataset.chat_template if template else None,
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


def encoder_of(recipe: Recipe, looked: Looked, tokenizer: Any) -> Encoder:
    """The encoder that prepared the rows, or would have."""
    template = looked.prepared.chat_template if looked.prepared else None
    if looked.prepared is None:
        with suppress(DataError):  # rows that are no conversations need none
            template = find(recipe.dataset.chat_template, tokenizer, HERE, lambda line: None)
    return Encoder.of(recipe.dataset, tokenizer, template)


def padding(recipe: Recipe, looked: Looked) -> dict[str, float]:
    """Share of a batch that would be padding, padded and packed."""
    whole = looked.prepared is not None and sum(part.rows for part in looked.prepared.parts) == len(looked.rows)
    parts = looked.prepared.parts if looked.prepared and whole else [Part(len(looked.rows))]
    trainer = recipe.trainer
    shares = padding_of(looked.census.lengths, parts, trainer.batch_size, trainer.micro_batch_size, recipe.seed)
    return shares if trainer.task.packable else {"padded": shares["padded"]}


def sample(looked: Looked, number: int, why: str, tokenizer: Any, task: Task) -> dict[str, Any]:
    """One row, token by token."""
    row, told = task.legible(looked.rows[number])
    text = visible(row.input_ids, row.spans, tokenizer)
    return {
        "row": number,
        "place": looked.places(looked.census, [number])[0],
        "why": ", ".join(filter(None, [why, told])),
        "tokens": len(row),
        "trained": looked.rows[number].trained,
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
