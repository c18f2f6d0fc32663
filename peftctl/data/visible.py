"""Token ids as texts that a person can look at, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from peftctl.data.fitting import Span
from peftctl.data.template import special_ids

LOST = "\ufffd"
"""What bytes that are no character decode to."""

LONGEST = 8
"""Tokens that one character is at most put together from."""


class Visible(NamedTuple):
    """What stands in one place: a token, or those that are one character together."""

    ids: tuple[int, ...]
    text: str
    trained: bool
    special: bool


def visible(ids: Sequence[int], spans: Sequence[Span], tokenizer: Any) -> list[Visible]:
    """The tokens `ids` in order, those in `spans` trained; their texts joined are the text that they decode to.

    A token is decoded together with the one before it: what it is alone may lack its space.
    """
    special = special_ids(tokenizer)
    trained = {at for start, end in spans for at in range(start, end)}
    shown, before, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        last = end == len(ids) or end - read == LONGEST or (end in trained) != (read in trained)
        known, text = decoded(ids[before:read], tokenizer), decoded(ids[before:end], tokenizer)
        if text.endswith(LOST) and not last:
            continue
        said = text[len(known) :] if text.startswith(known) else decoded(ids[read:end], tokenizer)
        part = tuple(ids[read:end])
        shown.append(Visible(part, said, read in trained, len(part) == 1 and part[0] in special))
        before, read = read, end
    return shown


def decoded(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of tokens, special ones included, nothing tidied up."""
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
    )
    return text
