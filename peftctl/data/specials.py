"""The special tokens that the texts of rows may spell, and those texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from peftctl.data.template import literals_read, special_ids


class Specials:
    """Patterns of what spells a special token of one tokenizer.

    What its template reads in an answer, such as the `</think>` that ends its thinking, is the template's there.
    """

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        ids = sorted(special_ids(tokenizer))
        tokens = [token for token in tokenizer.convert_ids_to_tokens(ids) if token and token.strip()]
        read = literals_read(template) if template else set()
        self.anywhere = _any_of(tokens)
        self.in_answers = _any_of([token for token in tokens if not any(token in literal for literal in read)])

    def of(self, message: Mapping[str, Any]) -> re.Pattern[str]:
        """The pattern for the texts of a message."""
        return self.in_answers if message["role"] == "assistant" else self.anywhere


def texts(value: Any) -> Iterator[str]:
    """Every text in a structure of mappings and lists, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts(inner)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The structure with every text of it changed, keys left out."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [mapped(inner, change) for inner in value]
    return value


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
