"""What a form of rows is: its keys, and how a row of it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peftctl.data.file import Row
from peftctl.data.formats.kinds import Example
from peftctl.errors import Problem

Format = Literal[
    "preference",
    "messages",
    "sharegpt",
    "unpaired_preference",
    "prompt_completion",
    "alpaca",
    "source_target",
    "image_text",
    "tokens_tags",
    "text_label",
    "text",
]
"""What a row can be."""

Problems = list[Problem]
"""Takes the mistakes of a row, so that all of them are told at once."""


def always(value: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to write a row down."""

    name: Format
    required: tuple[str, ...]
    """Keys that every row has, and not null."""

    optional: tuple[str, ...] = ()
    """Keys that mean something where they are there; other keys are passed over."""

    also: Mapping[str, str] = field(default_factory=dict)
    """What others call its keys, each with the key that it stands for where that is missing."""

    read: Callable[[Row, Problems], Example]
    """A row that has the required keys, as an example. What it returns counts only when it adds no problem."""

    fits: Callable[[Mapping[str, Any]], bool] = always
    """What else makes a row with the required keys look like this form, when it is guessed."""

    @property
    def keys(self) -> tuple[str, ...]:
        return self.required + self.optional

    def renamed(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its keys as the form calls them."""
        given = {key: value[name] for name, key in self.also.items() if value.get(name) is not None}
        return {**value, **{key: item for key, item in given.items() if value.get(key) is None}}

    def is_likely(self, value: Mapping[str, Any]) -> bool:
        """Whether a row looks like it."""
        value = self.renamed(value)
        return all(value.get(key) is not None for key in self.required) and self.fits(value)


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", dict: "an object", str: "a text", bytes: "bytes", bool: "true or false"}
    numbers = {int: "a number", float: "a number", type(None): "null"}
    return (names | numbers).get(type(value), f"a value of type `{type(value).__name__}`")


def text_at(row: Row, key: str, problems: Problems, blank: bool = False) -> str:
    """The text under `key`; a problem where it is none, or has nothing but space and `blank` is false."""
    value = row.value[key]
    if not isinstance(value, str):
        problems.append(Problem(f"{row.place}: {key}: expected a text; got {kind(value)}"))
        return ""
    if not blank and not value.strip():
        problems.append(Problem(f"{row.place}: {key}: is empty"))
    return value


def optional_text(row: Row, key: str, problems: Problems) -> str:
    """The text under `key`, empty where there is none."""
    return "" if row.value.get(key) is None else text_at(row, key, problems, blank=True)
