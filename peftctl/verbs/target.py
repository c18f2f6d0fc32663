"""What eval, merge, export and generate are pointed at: a run folder, a recipe, or an adapter folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from peftctl import bundled
from peftctl import recipe as recipes
from peftctl.engine.peft_config import CONFIG, read_config
from peftctl.errors import RunError
from peftctl.models.adapted import classifies, head_of
from peftctl.models.base import Model
from peftctl.models.head import CAUSAL, Head
from peftctl.models.origin import refuse_stranger
from peftctl.models.source import adapter as find_adapter
from peftctl.models.source import local
from peftctl.recipe import Recipe
from peftctl.tasks import TASKS, Task
from peftctl.verbs.run_folder import RunFolder


@dataclass(frozen=True)
class Target:
    """A base model and, when there is one, an adapter of it; with the recipe where one is known."""

    model: Model
    adapter: Path | None
    recipe: Recipe | None = None
    folder: RunFolder | None = None

    @property
    def head(self) -> Head:
        """What kind of model the adapter is for, with its labels; what the recipe says where there is no adapter."""
        wanted: Head | None = self.recipe.trainer.task.head if self.recipe else None
        if self.adapter is None:
            return wanted or CAUSAL
        if wanted is not None and not wanted.classifies and not classifies(self.adapter):
            return wanted
        return head_of(self.adapter, local(self.model.name_or_path, self.model.revision, weights=False))

    @property
    def task(self) -> Task:
        """The recipe's task, with the adapter's labels; without a recipe, one that such models are trained for."""
        if self.recipe is not None:
            return self.recipe.trainer.task.of(self.head)  # type: ignore[no-any-return]
        fitting = (task for task in (cls() for cls in TASKS.values()) if task.head.auto == self.head.auto)
        return next(task for task in fitting if task.judged == task).of(self.head)

    def check_base(self) -> None:
        """Raise RunError when the base is not the one that run and adapter were trained on."""
        name = self.model.name_or_path
        if self.folder is not None:
            self.folder.refuse_other_base(local(name, self.model.revision), name)
        if self.adapter is not None:
            refuse_stranger(self.adapter, local(name, self.model.revision), name)


def open_target(target: str, overrides: Iterable[str] = (), adapter: str | None = None) -> Target:
    """What `target` names. A recipe's adapter is the one in its output, when there is one.

    Raises RunError when it is none of the three, RecipeError for a recipe with mistakes.
    """
    named = target.removesuffix(".yaml") in bundled.names()
    path = Path(target) if named else find_adapter(target)
    if (path / "recipe.yaml").is_file():
        return of_run(RunFolder(path), overrides, adapter)
    if (path / CONFIG).is_file():
        return of_adapter(path, adapter)
    if path.is_dir():
        raise RunError(f"{target}: no run and no adapter is here", "a run folder holds `recipe.yaml`")
    recipe = recipes.read(target, overrides)
    run = RunFolder(recipe.output)
    folder = run if run.finished else None
    found = find_adapter(adapter) if adapter else (run.adapter if folder else None)
    return Target(recipe.model, found, recipe, folder)


def of_run(folder: RunFolder, overrides: Iterable[str], adapter: str | None) -> Target:
    """A run folder; an unfinished one offers its best or newest checkpoint by hand only."""
    recipe = recipes.read_run(folder.path, overrides)
    if adapter is None and not folder.finished:
        text = f"{folder.path}: this run is not finished"
        raise RunError(text, "go on with `peftctl train --resume`, or name a checkpoint's `adapter` folder")
    return Target(recipe.model, find_adapter(adapter) if adapter else folder.adapter, recipe, folder)


def of_adapter(path: Path, adapter: str | None) -> Target:
    """An adapter folder: its run's recipe when it lies in a run, else the base that its config names."""
    for parent in path.resolve().parents:
        if (parent / "recipe.yaml").is_file():
            folder = RunFolder(parent)
            recipe = recipes.read_run(parent)
            return Target(recipe.model, find_adapter(adapter) if adapter else path, recipe, folder)
    base = read_config(path).get("base_model_name_or_path")
    if not base:
        raise RunError(f"{path}: its config names no base model", "give one with `--base`")
    return Target(Model(name_or_path=base), find_adapter(adapter) if adapter else path)


def with_base(target: Target, base: str | None) -> Target:
    """The target on another base model, when one is given."""
    return replace(target, model=replace(target.model, name_or_path=base)) if base else target
