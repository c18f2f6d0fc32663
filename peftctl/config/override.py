"""`block.key=value`: one value of a recipe set from outside."""

from __future__ import annotations

from typing import Any

from peftctl.config.loader import DEEPEST, TOO_DEEP, Loaded, load
from peftctl.config.place import Keys, Mistake, Origin, Place, Spot
from peftctl.config.quote import dotted, got, quoted, shown
from peftctl.config.scalar import forbidden


def apply(override: str, origin: Origin, data: dict[str, Any], spots: dict[Keys, Spot]) -> list[Mistake]:
    """Set what `override` says in `data` and `spots`, both in place; or change nothing and say why not."""
    place = origin.whole()
    dotted_key, equals, text = override.partition("=")
    words = [word.strip() for word in dotted_key.split(".")]
    if not equals:
        return [Mistake(place, "expected `key=value`", f"write `{shown(override)}=VALUE`")]
    if not all(words) or forbidden(dotted_key) is not None:
        return [Mistake(place, "expected names with dots between them before the `=`")]
    loaded = load(text, origin)
    if loaded.mistakes:
        return loaded.mistakes
    if len(words) + max(map(len, loaded.spots), default=0) > DEEPEST:
        return [Mistake(place, TOO_DEEP)]
    wrong = _blocked(words, place, data)
    if wrong is None:
        _put(words, place, loaded, data, spots)
    return [] if wrong is None else [wrong]


def _blocked(words: list[str], place: Place, data: dict[str, Any]) -> Mistake | None:
    """Why the value at `words` cannot be set, or None. What is missing or null on the way can be made."""
    here: Any = data
    for depth, word in enumerate(words):
        path = quoted(dotted(tuple(words[:depth])))
        if here is None:
            return None
        if isinstance(here, dict):
            here = here.get(word)
        elif not isinstance(here, list):
            return Mistake(place, f"{path} is {got(here)}, which has no key {quoted(word)}")
        elif not (word.isascii() and word.isdigit() and len(word) < 6 and int(word) < len(here)):
            hint = f"its items are numbered 0 to {len(here) - 1}" if here else "it is empty"
            return Mistake(place, f"{path} has no item {quoted(word)}", hint)
        else:
            here = here[int(word)]
    return None


def _put(words: list[str], place: Place, loaded: Loaded, data: dict[str, Any], spots: dict[Keys, Spot]) -> None:
    here: Any = data
    path: Keys = ()
    for word in words[:-1]:
        key = int(word) if isinstance(here, list) else word
        path = (*path, key)
        if (here.get(key) if isinstance(here, dict) else here[key]) is None:
            here[key] = {}
            spots[path] = Spot(place, place)
        here = here[key]
    key = int(words[-1]) if isinstance(here, list) else words[-1]
    path = (*path, key)
    here[key] = loaded.data
    for old in [old for old in spots if old[: len(path)] == path]:
        del spots[old]
    spots[path] = Spot(place, place, "")  # of a value left out
    spots.update({path + inner: spot for inner, spot in loaded.spots.items()})
