"""The recipes that come with peftctl: in a wheel inside the package, in a checkout beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftctl.config.near import did_you_mean
from peftctl.errors import RecipeError

_PACKAGE = Path(__file__).parent
FOLDER = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"


def names() -> list[str]:
    """Every recipe, as `train` takes it: `llama7b-qlora`, `methods/lora`."""
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml"))


def path(name: str) -> Path:
    """The file of the recipe `name`. Raises RecipeError when there is none, with the nearest name."""
    name = name.removesuffix(".yaml")
    if name not in names():
        hint = did_you_mean(name, names()) or "`peftctl recipes` lists them"
        raise RecipeError(f"{name}: no recipe of this name comes with peftctl", hint)
    return FOLDER / f"{name}.yaml"


def text(name: str) -> str:
    """What stands in the recipe `name`."""
    return path(name).read_text(encoding="utf-8")


def describe() -> list[tuple[str, str]]:
    """Every recipe with its first line, a comment that says what it is for."""
    return [(name, text(name).partition("\n")[0].lstrip("# ")) for name in names()]


def copy(name: str, to: Path) -> list[Path]:
    """Copy the recipe `name` to the file `to`, with the data that comes with it beside it; returns what was written.

    Raises RecipeError when something is there already.
    """
    written = text(name).replace("../data/", "data/")  # beside the copy, wherever the recipe itself has it
    files = {
        file: to.parent / file.relative_to(FOLDER)
        for file in sorted((FOLDER / "data").rglob("*.jsonl"))
        if file.relative_to(FOLDER).as_posix() in written
    }
    there = [str(target) for target in (to, *files.values()) if target.exists()]
    if there:
        raise RecipeError(f"{there[0]}: exists already", "choose another place with `--to`")
    for file, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(written, encoding="utf-8")
    return [to, *files.values()]
