"""Continued pretraining: a causal language model goes on learning from plain text.

    loss = - sum over all tokens t but the first of log p(token t | tokens before t)

`on_long: split` trains long texts whole, in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftctl.data.formats import Example, Pair, Text
from peftctl.errors import DataError
from peftctl.tasks.sft import SFT
from peftctl.tasks.task import register


@register
@dataclass(frozen=True, kw_only=True)
class PlainText(SFT):
    """Plain text, every token of it: a causal language model learns what such texts are like."""

    talks: ClassVar[bool] = False
    measures: ClassVar[frozenset[str]] = frozenset({"truth"})

    def accept(self, example: Example) -> Example:
        """A text, or a prompt with its completion as one text."""
        if isinstance(example, Text):
            return example
        if isinstance(example, Pair):
            return Text(example.place, example.prompt + example.completion)
        hint = "rows are `text`; `task: sft` trains conversations"
        raise DataError(f"{example.place}: `text` trains plain texts, which this row is not", hint)
