"""pydantic's errors to one flaw per value, in the words of a person.

pydantic reports every member of a union by itself and knows no names of keys; the annotations say the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_origin

from peftctl.config.annotation import at, bare, keys, literals
from peftctl.config.near import did_you_mean
from peftctl.config.place import Keys
from peftctl.config.quote import quoted
from peftctl.config.words import either, expectation, limits

KINDS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a mapping",
    "dataclass": "a mapping",
    "none": "nothing",
    "path": "a path",
}
"""What pydantic's `KIND_type` and `KIND_parsing` errors expect."""

WRONG_TYPE = re.compile(rf"({'|'.join(KINDS)})_(type|parsing|from_float|exact_type|required)")

LIMITS = {"greater_than_equal": "at least", "greater_than": "above", "less_than_equal": "at most", "less_than": "below"}

LENGTHS = {
    "too_short": ("at least", "item"),
    "too_long": ("at most", "item"),
    "string_too_short": ("at least", "character"),
    "string_too_long": ("at most", "character"),
}

COMMON = re.compile(rf"{WRONG_TYPE.pattern}|{'|'.join(LIMITS)}|literal_error")
"""The errors that the annotations put better than pydantic."""

UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")

OWN = ("value_error", "assertion_error")
"""Raised by a check of ours, whose message stands."""

KEY = "[key]"
"""The end of pydantic's location of a wrong key in a mapping."""


@dataclass(frozen=True)
class Flaw:
    """What is wrong with one value, still without its place."""

    path: Keys
    text: str
    hint: str | None = None
    about_key: bool = False
    """The key is wrong, not its value."""
    about_block: bool = False
    """The mapping as a whole is wrong, though each of its values may be right."""
    expected: bool = False
    """`text` says what was expected, so what was got belongs behind it."""
    wanted: frozenset[str] = frozenset()
    """The types (`string`, `int`, `float`, `bool` among them) of which any would be right."""
    choices: tuple[str, ...] = ()
    """The texts of which any would be right."""


@dataclass(frozen=True)
class Line:
    """One of pydantic's errors."""

    kind: str
    loc: Keys
    """Keys, indices, and the names of the union members that were tried."""
    tags: tuple[int, ...]
    """Which entries of `loc` name a union's member."""
    path: Keys
    """The rest of `loc`."""
    message: str
    context: Mapping[str, Any]
    value: Any

    @property
    def entered(self) -> bool:
        """Whether the value had the right outer form, and failed a check of what is in it."""
        told = self.told
        return self.kind in OWN or (told is not None and not (told.expected and told.path == ()))

    @property
    def told(self) -> Flaw | None:
        """What the validator of a field found already."""
        return self.context.get("flaw")

    @property
    def wanted(self) -> frozenset[str]:
        """The types that would have been right; empty where the type was not what is wrong."""
        match = WRONG_TYPE.fullmatch(self.kind)
        if self.told:
            return self.told.wanted
        return frozenset({match[1]} if match else {"choice"} if self.kind == "literal_error" else ())


def flaws(errors: Iterable[Mapping[str, Any]], cls: type, data: Any) -> list[Flaw]:
    """One flaw for every wrong value of `data`, from the errors of reading it as a `cls`."""
    by_path: dict[Keys, list[Line]] = {}
    for line in _likeliest([_line(error, data) for error in errors]):
        by_path.setdefault(line.path, []).append(line)
    return [_flaw(lines, cls) for lines in by_path.values()]


def _line(error: Mapping[str, Any], data: Any) -> Line:
    loc, context = error["loc"], error.get("ctx", {})
    told: Keys = context["flaw"].path if "flaw" in context else ()
    outer = loc[: len(loc) - len(told)]
    path: list[str | int] = []
    tags: list[int] = []
    here = data
    for index, part in enumerate(outer):
        in_list = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if in_list or (isinstance(here, dict) and part in here):
            here = here[part]
            path.append(part)
        elif error["type"] == "missing" and index == len(outer) - 1:
            path += [part] if isinstance(part, str) else []  # an item that is missing is a matter of the list
        elif part != KEY:
            tags.append(index)
    return Line(error["type"], loc, tuple(tags), (*path, *told), error["msg"], context, error["input"])


def _likeliest(lines: list[Line], start: int = 0) -> list[Line]:
    """`lines` with the members of each union cut down to the likeliest: got furthest into the value, fewest errors."""
    chosen: list[Line] = []
    unions: dict[Keys, dict[str | int, list[Line]]] = {}
    for line in lines:
        tag = next((tag for tag in line.tags if tag >= start), None)
        if tag is None:
            chosen.append(line)
        else:
            unions.setdefault(line.loc[:tag], {}).setdefault(line.loc[tag], []).append(line)
    for prefix, by_member in unions.items():
        depth = len(prefix) - sum(tag < len(prefix) for tag in next(iter(by_member.values()))[0].tags)
        members = [_likeliest(member, len(prefix) + 1) for member in by_member.values()]
        inside = [m for m in members if all(line.entered or len(line.path) > depth for line in m)]
        fewest = min((len({line.path for line in m}) for m in inside), default=0)
        members = [m for m in inside if len({line.path for line in m}) == fewest] or members
        chosen += [line for member in members for line in member]
    return chosen


def _flaw(lines: list[Line], cls: type) -> Flaw:
    """The one flaw of a value, from its errors: one, or several where a union's members were tried."""
    line = next((line for line in lines if line.entered), lines[0])
    path = line.path
    if line.told and (line.entered or len(lines) == 1):
        return replace(line.told, path=path)
    if line.kind in OWN:
        text, _, hint = str(line.context["error"]).partition("; hint: ")
        return Flaw(path, text, hint or None, about_block=True)
    if line.kind == "missing":
        if isinstance(line.loc[-1], str):
            return Flaw(path[:-1], f"missing key {quoted(line.loc[-1])}", about_block=True)
        return Flaw(path, f"expected {expectation(at(cls, line.loc[:-1], line.tags))}", expected=True)
    if line.kind in UNKNOWN or line.loc[-1:] == (KEY,):
        block = line.loc[:-2] if line.loc[-1] == KEY else line.loc[:-1]
        known = keys(at(cls, block, line.tags))
        listed = f"known keys: {', '.join(f'`{name}`' for name in known)}" if known else None
        return Flaw(path, "unknown key", did_you_mean(str(path[-1]), known) or listed, about_key=True)
    found = [member for line in lines for member in at(cls, line.loc, line.tags)]
    return _unexpected(lines, [member for index, member in enumerate(found) if member not in found[:index]])


def _unexpected(lines: list[Line], found: list[Any]) -> Flaw:
    """A value that is not what the annotations `found` expect; they are empty where nothing is known of the class."""
    line, kinds = lines[0], {line.kind for line in lines}
    wanted = frozenset().union(*(line.wanted for line in lines)) if all(line.wanted for line in lines) else frozenset()
    choices = literals(found) or [name for line in lines for name in _choices(line)]
    limit = limits(found[0]) if len(found) == 1 else ""
    if limit and not limit.startswith("from") and kinds <= LIMITS.keys():
        words = limit
    elif any(bare(member) is not Any for member in found) and all(map(COMMON.fullmatch, kinds)):
        words = expectation(found, limited=len(lines) > 1 or not wanted)
    elif [get_origin(bare(member)) for member in found] == [tuple]:
        words = expectation(found)  # of fixed length
    else:
        words = either(_words(line) for line in lines)
    hint = did_you_mean(line.value, choices) if isinstance(line.value, str) else None
    return Flaw(line.path, f"expected {words}", hint, expected=True, wanted=wanted, choices=tuple(choices))


def _words(line: Line) -> str:
    """What one error expects, by itself."""
    if line.told:
        return line.told.text.removeprefix("expected ")
    if match := WRONG_TYPE.fullmatch(line.kind):
        return KINDS[match[1]]
    if line.kind in LIMITS:
        return f"{LIMITS[line.kind]} {next(iter(line.context.values())):g}"
    if choices := _choices(line):
        return f"one of {', '.join(f'`{name}`' for name in choices)}"
    if line.kind in LENGTHS:
        bound, unit = LENGTHS[line.kind]
        count = next(value for key, value in line.context.items() if key in ("min_length", "max_length"))
        return f"{bound} {count} {unit}{'s' * (count != 1)}"
    return line.message.removeprefix("Input should be ")


def _choices(line: Line) -> list[str]:
    """The values that a Literal of a class unknown here allows, from pydantic's `'a', 'b' or 'c'`."""
    return re.findall(r"'([^']*)'", line.context["expected"]) if line.kind == "literal_error" else []
