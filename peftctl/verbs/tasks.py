"""`peftctl tasks`: what can be trained for, and what each task has to set, out of the tasks' own docstrings."""

from __future__ import annotations

from typing import Any

from peftctl.config.fields import fields
from peftctl.config.near import did_you_mean
from peftctl.errors import RecipeError
from peftctl.tasks import TASKS, Task
from peftctl.verbs.methods import page


def describe(name: str | None = None) -> Any:
    """One task with its fields, or every task in short. Raises RecipeError for an unknown name."""
    if name is None:
        return [short(key, cls) for key, cls in sorted(TASKS.items())]
    if name not in TASKS:
        raise RecipeError(f"{name}: no such task", did_you_mean(name, TASKS) or "`peftctl tasks` lists them")
    cls = TASKS[name]
    listed = [{"name": f.name, "type": f.type, "default": f.default, "doc": f.doc} for f in fields(cls)]
    return {**short(name, cls), "model": cls().head.what, "metrics": cls.metrics, "page": page(cls), "fields": listed}


def short(name: str, cls: type[Task]) -> dict[str, str]:
    """What fits into a line."""
    return {"name": name, "title": (cls.__doc__ or "").partition("\n")[0].removesuffix(".")}
