"""How a person would put an annotation: `text or a list of texts`, `a whole number of at least 1`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from peftctl.config.annotation import bare, is_block, is_list, literals, members, metadata

SCALARS: dict[Any, tuple[str, str]] = {
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "truth values"),
    object: ("anything", "anything"),
    Any: ("anything", "anything"),
}
"""One and several of each scalar type."""


def expectation(found: Iterable[Any], *, limited: bool = False) -> str:
    """What a message expects where the annotations `found` hold; with `limited` together with their limits."""
    parts = [_one(member, limited) for member in found if get_origin(bare(member)) is not Literal]
    choices = [f"`{value}`" for value in literals(found)]
    if choices:
        parts.insert(0, f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0])
    return either(parts)


def type_words(annotation: Any) -> str:
    """The same for a table: without articles and backticks, `text or list of texts`."""
    spoken = expectation(members(annotation), limited=True).replace("`", "")
    return re.sub(r"\ba (?=whole number|number|list|mapping|path)", "", spoken)


def either(parts: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`, each once."""
    *front, last = dict.fromkeys(parts) or [""]
    return f"{', '.join(front)} or {last}" if front else last


def limits(annotation: Any) -> str:
    """`at least 1`, `above 0`, `from 0 to 1`; empty where there is no limit."""
    low = high = ""
    for limit in metadata(annotation):
        if isinstance(limit, Ge):
            low = f"at least {limit.ge}"
        elif isinstance(limit, Gt):
            low = f"above {limit.gt}"
        elif isinstance(limit, Le):
            high = f"at most {limit.le}"
        elif isinstance(limit, Lt):
            high = f"below {limit.lt}"
    if low.startswith("at least ") and high:
        return f"from {low.removeprefix('at least ')} to {high.removeprefix('at most ')}"
    return f"{low} and {high}" if low and high else low or high


def _one(annotation: Any, limited: bool) -> str:
    base, arguments = bare(annotation), get_args(bare(annotation))
    if base in SCALARS:
        limit = limits(annotation) if limited else ""
        return SCALARS[base][0] + (" of" if limit.startswith("at ") else "") + (f" {limit}" if limit else "")
    if is_block(base):
        return "a mapping"
    if get_origin(base) is dict or base is dict:
        return f"a mapping of names to {_several(arguments[1])}" if arguments else "a mapping"
    if get_origin(base) is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} {_several(arguments[0]) if len(set(arguments)) == 1 else 'values'}"
    if is_list(base):
        return f"a list of {_several(arguments[0])}" if arguments else "a list"
    if isinstance(base, type) and issubclass(base, PurePath):
        return "a path"
    return str(getattr(base, "__name__", base))


def _several(annotation: Any) -> str:
    found = members(annotation)
    choices = literals(found)
    parts = [f"any of {', '.join(f'`{value}`' for value in choices)}"] if choices else []
    for member in found:
        base = bare(member)
        if base in SCALARS:
            parts.append(SCALARS[base][1])
        elif get_origin(base) is not Literal:
            parts.append(_one(member, False).replace("a mapping", "mappings", 1).replace("a list", "lists", 1))
    return either(parts)
