"""`peftctl bench`: a few steps of a recipe, for their speed and their memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from peftctl import recipe as recipes
from peftctl.data.sources import listed
from peftctl.recipe import Recipe
from peftctl.verbs.events import Event, Listen, silent
from peftctl.verbs.imitation import here
from peftctl.verbs.plan import LONG, long_row
from peftctl.verbs.train import train


def bench(
    recipe: Recipe | str | Path | Mapping[str, Any], *, steps: int = 6, listen: Listen = silent
) -> dict[str, Any]:
    """Train `steps` steps of a recipe in a folder that goes away, and return how long each took and what they held.

    Rows that are not here are made up, as long as rows may be. The first step, which warms up, is not measured.
    Raises PeftctlError as `train` does.
    """
    recipe = recipes.coerce(recipe)
    heard: list[Event] = []

    def hear(event: Event) -> None:
        if event["event"] == "step":
            heard.append(event)
        if event["event"] != "trained":
            listen(event)

    with tempfile.TemporaryDirectory(prefix="peftctl-bench-") as temporary:
        folder = Path(temporary)
        dataset = replace(recipe.dataset, eval=None)
        if not all(here(source.path) for source in listed(dataset.train)):
            dataset = replace(dataset, train=made_up(recipe, steps, folder), columns={}, on_long="truncate")
        trainer = replace(recipe.trainer, steps=steps, epochs=1.0, save_every=None, eval_every=None)
        result = train(replace(recipe, dataset=dataset, trainer=trainer), output=folder / "run", listen=hear)
    measured = heard[1:]
    seconds = [event["seconds"] for event in measured]
    return {
        "steps": len(seconds),
        "tokens_per_second": sum(event["tokens"] for event in measured) / sum(seconds),
        "step_seconds": {"median": median(seconds), "least": min(seconds), "most": max(seconds), "all": seconds},
        "peak_memory": result["peak_memory"],
        "predicted_memory": result["predicted_memory"],
    }


def made_up(recipe: Recipe, steps: int, folder: Path) -> str:
    """A file of long rows, enough for all steps but no more than a thousand."""
    path = folder / "rows.jsonl"
    count = min(steps * recipe.trainer.batch_size, 1000)
    text = LONG * (4 * recipe.dataset.max_length // len(LONG) + 2)
    rows = [long_row(recipe.dataset, recipe.trainer.task, text, number) for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
