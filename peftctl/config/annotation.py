"""Which annotations of a dataclass hold at a path of a recipe."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from peftctl.config.place import Keys


@cache
def hints(cls: type) -> Mapping[str, Any]:
    """The annotations of the fields of a dataclass, by name, inherited ones first."""
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls) if field.init}


def members(annotation: Any) -> list[Any]:
    """The members of a union without None; of anything else, itself."""
    base = bare(annotation)
    if get_origin(base) not in (Union, types.UnionType):
        return [] if base in (None, types.NoneType) else [annotation]
    return [inner for member in get_args(base) for inner in members(member)]


def bare(annotation: Any) -> Any:
    """The annotation without what Annotated adds to it."""
    return bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def metadata(annotation: Any) -> list[Any]:
    """What Annotated adds to an annotation, such as its limits."""
    if get_origin(annotation) is not Annotated:
        return []
    inner, *own = get_args(annotation)
    return [*metadata(inner), *own]


def nullable(annotation: Any) -> bool:
    """Whether None is allowed."""
    base = bare(annotation)
    if get_origin(base) in (Union, types.UnionType):
        return any(map(nullable, get_args(base)))
    return base in (None, types.NoneType)


def at(annotation: Any, path: Keys, names: Collection[int] = ()) -> list[Any]:
    """The annotations of what lies at `path` below `annotation`, several where a union leaves a choice.

    `names` are the indices of parts of `path` that are no keys but the name of a union's member.
    """
    found = members(annotation)
    for index, part in enumerate(path):
        if index in names:
            found = [member for member in found if getattr(bare(member), "__name__", "") == part] or found
        else:
            found = [inner for member in found for inner in _below(bare(member), part)]
    return found


def _below(base: Any, key: str | int) -> list[Any]:
    if is_block(base):
        return members(hints(base).get(str(key)))
    arguments = get_args(base)
    if get_origin(base) in (dict, Mapping) and isinstance(key, str):
        return members(arguments[1])
    if get_origin(base) is tuple and isinstance(key, int):
        inner = arguments[0] if Ellipsis in arguments else arguments[key] if key < len(arguments) else None
        return members(inner)
    return members(arguments[0]) if is_list(base) and arguments and isinstance(key, int) else []


def is_block(base: Any) -> bool:
    """Whether a bare annotation is a dataclass: a mapping with known keys."""
    return isinstance(base, type) and dataclasses.is_dataclass(base)


def is_list(base: Any) -> bool:
    """Whether a bare annotation is read from a list."""
    return (get_origin(base) or base) in (list, tuple, set, frozenset, Sequence)


def keys(found: Iterable[Any]) -> list[str]:
    """The keys that the blocks among `found`, and the mappings whose keys are Literals, know."""
    known: list[str] = []
    for base in map(bare, found):
        if is_block(base):
            known += hints(base)
        elif get_origin(base) in (dict, Mapping):
            known += literals(members(get_args(base)[0]))
    return known


def literals(found: Iterable[Any]) -> list[str]:
    """The values that the Literals among `found` allow, as a recipe writes them."""
    values = [value for member in found if get_origin(bare(member)) is Literal for value in get_args(bare(member))]
    return [value if isinstance(value, str) else str(value).lower() for value in values]
