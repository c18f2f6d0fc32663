"""What rows become for a task: which of them it takes, and how they are encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoder
from peftctl.data.fitting import Encoded
from peftctl.data.formats import Chat, Example, Feedback, Preference
from peftctl.data.supervised import supervised

Accept = Callable[[Example], Example]
"""What an example becomes; raises DataError for one of which it makes nothing."""


class RowEncoder(Protocol):
    """Examples that were accepted, as ids with trained spans."""

    tokenizer: Any
    max_length: int
    """Tokens of the longest row."""
    stop_ids: set[int]
    """Gathers the tokens that were trained to end an answer."""
    spelled: int
    """Counts the rows whose own text spells a special token."""

    @property
    def splits_special_tokens(self) -> bool:
        """Whether such a spelling is ordinary text."""

    def encode(self, row: Any) -> list[Encoded]:
        """A row as it is trained, in pieces where it is split; none when it is dropped. Raises DataError."""

    def compared(self, row: Any, whole: bool) -> Encoded:
        """A row whose answer is compared with others, the token that ends it only if `whole`. Raises DataError."""

    def prompt(self, row: Any) -> list[int]:
        """The ids that a row's answer is generated from. Raises DataError."""


class Reading(NamedTuple):
    """How one task reads rows."""

    name: str
    """Names the task and its settings: rows that are kept by another name are others."""
    accept: Accept = supervised
    encoder: Callable[[Dataset, Any, str | None], RowEncoder] = Encoder.of
    """From the data set, the tokenizer, and the chat template where there are conversations."""


SUPERVISED = Reading("sft")


def spoken(row: object) -> bool:
    """Whether a row holds messages, which need a chat template."""
    return isinstance(row, Chat) or (isinstance(row, Preference | Feedback) and not isinstance(row.prompt, str))
