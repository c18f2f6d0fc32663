"""`peftctl methods`: what there is, and what each has to set, out of the methods' own docstrings."""

from __future__ import annotations

import sys
from typing import Any

from peftctl.config.fields import fields
from peftctl.config.near import did_you_mean
from peftctl.engine.method import Method
from peftctl.engine.peft_config import PEFT_TYPES
from peftctl.errors import RecipeError
from peftctl.methods import METHODS
from peftctl.recipe import PRESETS


def describe(name: str | None = None) -> Any:
    """One method with its fields, or every method in short. Raises RecipeError for an unknown name."""
    if name is None:
        presets = [short(preset, METHODS[real]) | told(preset) for preset, (real, _) in PRESETS.items()]
        return sorted([*(short(key, cls) for key, cls in METHODS.items()), *presets], key=lambda m: m["name"])
    if name in PRESETS:
        return long(name, METHODS[PRESETS[name][0]]) | told(name)
    if name not in METHODS:
        hint = did_you_mean(name, [*METHODS, *PRESETS]) or "`peftctl methods` lists them"
        raise RecipeError(f"{name}: no such method", hint)
    return long(name, METHODS[name])


def short(name: str, cls: type[Method]) -> dict[str, Any]:
    """What fits into a line."""
    title = page(cls).partition("\n")[0].partition(". ")[0].removesuffix(".")
    peft = cls.peft_type if cls.peft_type in PEFT_TYPES else None
    return {"name": name, "title": title, "learning_rate": cls.learning_rate, "paper": cls.paper, "peft": peft}


def long(name: str, cls: type[Method]) -> dict[str, Any]:
    """Everything: the page that the method's file opens with, and its fields."""
    listed = [{"name": f.name, "type": f.type, "default": f.default, "doc": f.doc} for f in fields(cls)]
    clashes = {key: f"{why}; {way_out}" for key, (why, way_out) in cls.clashes.items()}
    return {**short(name, cls), "merges": cls.merges, "clashes": clashes, "page": page(cls), "fields": listed}


def told(preset: str) -> dict[str, str]:
    """What a preset stands for."""
    real, settings = PRESETS[preset]
    keys = [f"`{block}.{key}: {value}`" for block, values in settings.items() for key, value in values.items()]
    return {"name": preset, "title": f"`{real}` with {', '.join(keys)}"}


def page(cls: type[Any]) -> str:
    """The docstring of the file that a method or a task is written in."""
    return (sys.modules[cls.__module__].__doc__ or "").strip()
