"""A recipe as it was written: plain data, and the place of every key and value for messages about them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from peftctl.config.loader import LARGEST, TOO_LARGE, load
from peftctl.config.near import did_you_mean
from peftctl.config.override import apply
from peftctl.config.place import Keys, Mistake, Origin, Spot
from peftctl.config.quote import dotted, got, shown
from peftctl.errors import Problem, RecipeError


@dataclass(frozen=True)
class Document:
    """A mapping of mappings, lists and scalars, and how each of them was written."""

    name: str
    """Where it was read from, as the user gave it."""
    data: dict[str, Any]
    spots: Mapping[Keys, Spot]
    """How the value at every path is written; the whole document is at `()`."""

    def spot(self, path: Keys) -> Spot:
        """How the value at `path` is written, or the nearest that encloses it."""
        while path not in self.spots:
            path = path[:-1]
        return self.spots[path]

    def value(self, path: Keys) -> Any:
        """The value at `path`, which must be there."""
        found: Any = self.data
        for key in path:
            found = found[key]
        return found

    def problem(self, path: Keys, text: str, hint: str | None = None) -> Problem:
        """A problem with the value at `path`: `bad.yaml:7:10: method.alpha: text`."""
        place = self.spot(path).value.text
        return Problem(f"{place}: {dotted(path)}: {text}" if path else f"{place}: {text}", hint)

    def with_overrides(self, overrides: Iterable[str]) -> Document:
        """The document with every `key.key=value` set, in order; a value is YAML, and null where it is left out.

        Mappings on the way are made where they are missing; a number picks an item of a list. Raises RecipeError with
        all that cannot be.
        """
        data, spots = deepcopy(self.data), dict(self.spots)
        mistakes: list[Mistake] = []
        source = max(spot.value.source for spot in spots.values())
        for override in overrides:
            source += 1
            mistakes += apply(override, Origin(f"override `{shown(override, 100)}`", source), data, spots)
        _raise(mistakes)
        return Document(self.name, data, spots)


def parse(text: str, name: str) -> Document:
    """The recipe in `text`; places begin with `name`. Raises RecipeError with everything that is wrong with it."""
    origin = Origin(name)
    loaded = load(text, origin)
    if not loaded.mistakes and loaded.empty:
        loaded.mistakes.append(Mistake(origin.whole(), "empty"))
    elif not loaded.mistakes and not isinstance(loaded.data, dict):
        place, written = loaded.spots[()].value, loaded.spots[()].written
        loaded.mistakes.append(Mistake(place, f"expected a mapping; got {got(loaded.data, written)}"))
    _raise(loaded.mistakes)
    return Document(name, loaded.data, loaded.spots)


def read(path: str | os.PathLike[str]) -> Document:
    """The recipe in the file `path`. Raises RecipeError with everything that is wrong with it."""
    given = os.fspath(path)
    name = shown(given, 1000)
    try:
        with open(given, "rb") as file:
            raw = file.read(LARGEST)
    except FileNotFoundError:
        raise RecipeError(f"{name}: no such file", _near(given)) from None
    except IsADirectoryError:
        found = ", ".join(f"`{shown(file)}`" for file in _yaml_files(given)[:5])
        raise RecipeError(f"{name}: a folder; expected a YAML file", f"it holds {found}" if found else None) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{name}: cannot be read: {why.lower()}") from None
    if len(raw) == LARGEST:
        raise RecipeError(f"{name}: {TOO_LARGE}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        place = Origin(name).offset(before, len(before))
        raise RecipeError(f"{place.text}: not UTF-8 text", "save the file as UTF-8") from None
    return parse(text.removeprefix("\ufeff"), name)


def _yaml_files(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder or ".") if name.endswith((".yaml", ".yml")))
    except OSError:
        return []


def _near(path: str) -> str | None:
    """Which file was probably meant by `path`, a file that is not there."""
    folder, name = os.path.split(path)
    if folder and not os.path.isdir(folder):
        return f"there is no folder `{shown(folder)}`"
    near = did_you_mean(name, _yaml_files(folder))
    return near and near.replace("`", f"`{shown(os.path.join(folder, ''), 1000)}`"[:-1], 1)


def _raise(mistakes: list[Mistake]) -> None:
    """Raise RecipeError with all of `mistakes`, in reading order, if there are any."""
    if mistakes:
        in_order = sorted(mistakes, key=lambda mistake: mistake.place)
        raise RecipeError.of([Problem(f"{place.text}: {text}", hint) for place, text, hint in in_order])
