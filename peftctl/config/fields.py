"""The fields of a block: the one source of `peftctl methods NAME`, of help texts and of the schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any, NamedTuple

from peftctl.config.annotation import hints
from peftctl.config.words import type_words
from peftctl.config.write import dump


class Field(NamedTuple):
    """One key of a block, for people."""

    name: str
    type: str
    """In words: `number`, `text or list of texts`, `one of a, b`."""
    required: bool
    default: Any
    """As plain data; None when it is required."""
    doc: str
    """On one line; empty where the source has none."""


def fields(cls: type) -> list[Field]:
    """The fields of the dataclass `cls`, inherited ones first."""
    annotated, docs = hints(cls), docstrings(cls)
    found = []
    for field in dataclasses.fields(cls):
        if field.init:
            required, default = _default(field)
            found.append(
                Field(field.name, type_words(annotated[field.name]), required, default, docs.get(field.name, ""))
            )
    return found


def _default(field: dataclasses.Field[Any]) -> tuple[bool, Any]:
    if field.default_factory is not dataclasses.MISSING:
        return False, dump(field.default_factory())
    required = field.default is dataclasses.MISSING
    return required, None if required else dump(field.default)


@cache
def docstrings(cls: type) -> Mapping[str, str]:
    """The docstrings under the fields of `cls` and of its bases, by name, each on one line.

    Python keeps none of them, so they are read from the source; a class without one, such as of a prompt, has none.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _own_docstrings(base)
    return found


def _own_docstrings(cls: type) -> dict[str, str]:
    try:
        (body,) = ast.parse(dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    found: dict[str, str] = {}
    statements = getattr(body, "body", [])
    for statement, after in pairwise(statements):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
