"""Checked blocks to plain data, and plain data to YAML that reads back equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from types import NoneType
from typing import Any

import yaml

from peftctl.config.quote import quoted
from peftctl.config.scalar import FLOAT, forbidden, plain
from peftctl.errors import RecipeError

TAGS = {NoneType: "null", bool: "bool", int: "int", float: "float"}


def dump(value: Any) -> Any:
    """A block as a dict of all its fields, in their order, and what is in it as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: dump(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def to_yaml(data: Any) -> str:
    """`data`, in the order given, as YAML that versions 1.1 and 1.2 both read back equal.

    Raises RecipeError for what a recipe cannot hold, such as an infinity or an object.
    """
    whole = dump(data)
    _check(whole)
    return str(yaml.dump(whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def _check(data: Any) -> None:
    if isinstance(data, dict):
        for key, item in data.items():
            if type(key) is not str:
                raise RecipeError(f"the key {quoted(str(key))} is no text")
            _check(key)
            _check(item)
    elif isinstance(data, list):
        for item in data:
            _check(item)
    elif type(data) is str:
        if forbidden(data) is not None:
            raise RecipeError(f"the text {quoted(data)} has a character that no recipe can hold")
    elif type(data) not in TAGS or (type(data) in (int, float) and plain(str(data)) != data):
        raise RecipeError(f"{quoted(str(data))} is neither text, a finite number, true, false nor null")


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that occurs twice is written twice

    def represent_text(self, text: str) -> yaml.ScalarNode:
        escaped = not text.isprintable()  # PyYAML's other styles lose U+0085 and its like
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if escaped else None)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            meant = type(plain(value))
            if meant is not str:
                return f"tag:yaml.org,2002:{TAGS[meant]}"
            if FLOAT.fullmatch(value):  # too large for us, but other readers make it infinite
                return "tag:yaml.org,2002:float"
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


_Dumper.add_representer(str, _Dumper.represent_text)
