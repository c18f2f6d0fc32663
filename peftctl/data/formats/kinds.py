"""What rows are once they are read: a conversation, a pair of texts, a text with its label, answers compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role` and `content`, and what else the chat template may read, such as `tool_calls` or `reasoning_content`."""

Said = str | list[Message]
"""A text, or messages."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the assistant's turns from message `first` on are trained."""

    place: str
    messages: list[Message]
    first: int = 0
    tools: Sequence[Any] | None = None
    """JSON schemas of the functions that the assistant may call."""

    flags: tuple[bool, ...] | None = None
    """Of each message, whether it may be trained."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A text to go on from, and how; the completion is trained."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; all of it is trained."""

    place: str
    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or two, and the class it belongs to."""

    place: str
    text: str
    label: str | int
    pair: str | None = None
    """The second text, where a class is of two."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, and the class of each."""

    place: str
    tokens: list[str]
    tags: Sequence[str | int]


@dataclass(frozen=True, slots=True)
class Translated:
    """A text and what it is turned into: its translation, its summary."""

    place: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, a better and a worse one; all three are texts or all three messages."""

    place: str
    prompt: Said
    chosen: Said
    rejected: Said
    tools: Sequence[Any] | None = None
    """JSON schemas of the functions that the assistant may call."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """An answer, and whether it is a good one; prompt and completion are both texts or both messages."""

    place: str
    prompt: Said
    completion: Said
    desirable: bool
    tools: Sequence[Any] | None = None
    """JSON schemas of the functions that the assistant may call."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """An image and the text that belongs to it."""

    place: str
    image: str | bytes
    """A path as the row has it, relative to the file of rows; or the bytes of an image file."""

    text: str


Parsed = Chat | Pair | Text
"""What supervised fine-tuning trains."""

Example = Chat | Pair | Text | Labelled | Tagged | Translated | Preference | Feedback | Captioned
"""What a row can be."""
