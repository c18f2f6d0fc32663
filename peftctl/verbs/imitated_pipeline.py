"""A stand-in for a pipeline of diffusers: a random one of the same class; and pictures for rows that have none."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftctl.errors import ModelError
from peftctl.models.diffusion import kind_in
from peftctl.models.folder import PIPELINE
from peftctl.models.pipelines import KNOWN
from peftctl.models.quiet import Say
from peftctl.models.source import resolve
from peftctl.models.tiny_pipeline import write_pipeline
from peftctl.recipe import Recipe

SIDE = 64
"""Pixels of its pictures."""


def imitated(recipe: Recipe, folder: Path, say: Say) -> Path:
    """A random pipeline of the class that the recipe names, in `folder`. Raises ModelError where that is not known."""
    place = recipe.model.name_or_path
    named = class_of(place, recipe.model.revision)
    say(f"model: `{place}` as a random `{named}`")
    return write_pipeline(named, folder, seed=recipe.seed)


def class_of(place: str, revision: str | None) -> str:
    """The class of the pipeline at `place`, without a network. Raises ModelError."""
    from huggingface_hub import try_to_load_from_cache

    found = resolve(place)
    if isinstance(found, str):
        cached = try_to_load_from_cache(found, PIPELINE, revision=revision)
        if not isinstance(cached, str):
            if found in KNOWN:
                return KNOWN[found]
            text = f"{place}: its pipeline is not known here, and no network is asked"
            raise ModelError(text, f"name a folder that holds its `{PIPELINE}`, or one of {', '.join(KNOWN)}")
        found = Path(cached).parent
    return kind_in(found, place)[0].pipeline


def smaller(task: Any) -> Any:
    """The task for pictures of the stand-in's size."""
    return replace(task, resolution=SIDE)


def draw_pictures(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A picture of one colour for every row that names a file, in `folder`, where that is not there."""
    from PIL import Image

    for number, row in enumerate(rows):
        colour = colorsys.hsv_to_rgb(number / len(rows), 0.8, 0.9)
        Image.new("RGB", (SIDE, SIDE), tuple(round(255 * part) for part in colour)).save(folder / row["image"])
