"""The words of a text into classes: names, parts of speech. The head is trained whole, beside the adapter.

    loss = - sum over words of log p(tag | text), at the first token of each word

Words are joined by spaces. A prepared row is the text's ids, and behind them, for each word, where its first token
stands, and then for each word its tag; the tags are the trained span.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftctl.data.batches import collate
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.fitting import OnLong
from peftctl.data.formats import Example, Tagged
from peftctl.data.reading import RowEncoder
from peftctl.data.spelling import Spelling
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError
from peftctl.models.head import TOKENS, Head
from peftctl.tasks.classifying import Classifying, number_of
from peftctl.tasks.task import Batch, register


@register
@dataclass(frozen=True, kw_only=True)
class TokenClassification(Classifying):
    """Every word of a text into one of a set of classes, such as names or parts of speech."""

    form: ClassVar[str] = "tokens_tags"
    metrics: ClassVar[tuple[str, ...]] = ("token_accuracy", "entity_f1", "loss")
    measures: ClassVar[frozenset[str]] = frozenset({"truth", "tags"})
    kind: ClassVar[Head] = TOKENS

    def accept(self, example: Example) -> Example:
        if isinstance(example, Tagged):
            return replace(example, tags=[self.named(tag) for tag in example.tags])
        hint = "rows are `tokens` and `tags`, lists of the same length; `columns: {tags: pos_tags}` maps other keys"
        text = f"{example.place}: `token_classification` trains words with their tags, which this row is not"
        raise DataError(text, hint)

    def labels_of(self, example: Example) -> Iterable[str | int]:
        assert isinstance(example, Tagged)
        return example.tags

    def asked(self, text: str, chat: bool) -> Example:
        words = text.split()
        return Tagged("text", words, [self.labels[0]] * len(words))

    def worded(self, text: str, logits: Tensor) -> str:
        """A word and its tag in each line, with a tab between them."""
        tags = [self.labels[number] for number in logits.argmax(-1).tolist()]
        return "\n".join(f"{word}\t{tag}" for word, tag in zip(text.split(), tags, strict=True))

    def tokens(self, row: Encoded) -> int:
        return len(row) - 2 * row.trained

    def legible(self, row: Encoded) -> tuple[Encoded, str]:
        text, _, tags = parted(row)
        return Encoded(text, ()), f"tags {' '.join(self.labels[number] for number in tags)}"

    def encoder(self, dataset: Dataset, tokenizer: Any, template: str | None) -> RowEncoder:
        if dataset.on_long == "split":
            raise DataError("dataset.on_long: words and their tags are not split", "use `truncate` or `drop`")
        return TagEncoder(self.labels, dataset, tokenizer)

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """`input_ids`, `attention_mask` and `labels` [rows, tokens], labels -100 but at the first token of a word."""
        parts = [parted(row) for row in rows]
        batch = collate([Encoded(text, ()) for text, _, _ in parts], pad_id)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for number, (_, firsts, tags) in enumerate(parts):
            labels[number, firsts.tolist()] = torch.tensor(tags.tolist())
        return {**batch, "labels": labels}


def parted(row: Encoded) -> tuple[array[int], array[int], array[int]]:
    """The ids of a prepared row's text; where in it each word begins; the numbers of the tags."""
    words = row.trained
    length = len(row) - 2 * words
    return row.ids[:length], row.ids[length : length + words], row.ids[length + words :]


class TagEncoder:
    """Encodes words with their tags."""

    def __init__(self, labels: Sequence[str], dataset: Dataset, tokenizer: Any) -> None:
        self.labels = list(labels)
        self.tokenizer, self.max_length = tokenizer, dataset.max_length
        self.on_long: OnLong = dataset.on_long
        self.stop_ids: set[int] = set()
        self.spelled = 0
        self._spelling = Spelling(tokenizer, None, dataset.split_special_tokens)

    @property
    def splits_special_tokens(self) -> bool:
        """Whether special tokens that a text spells are ordinary text."""
        return self._spelling.split

    def encode(self, row: Tagged) -> list[Encoded]:
        """A row; none when it is too long and dropped. Raises DataError for one too long, or with another tag."""
        self.spelled += any(map(self._spelling.in_text, row.tokens))
        tags = [number_of(tag, self.labels, row.place) for tag in row.tags]
        ids, firsts, closing = self._text(row)
        over = len(ids) - self.max_length
        if over <= 0:
            return [made(ids, firsts, tags)]
        if self.on_long == "drop":
            return []
        if self.on_long == "error":
            text = f"{row.place}: {len(ids)} tokens, more than `max_length` {self.max_length}"
            raise DataError(text, "raise `dataset.max_length`, or choose `on_long: truncate` or `drop`")
        most = self.max_length - closing
        kept = sum(first < most for first in firsts)
        if not kept:
            raise DataError(f"{row.place}: no word is left in {self.max_length} tokens", "raise `dataset.max_length`")
        cut = made([*ids[:most], *ids[len(ids) - closing :]], firsts[:kept], tags[:kept])
        return [replace(cut, truncated=True, cut=over)]

    def compared(self, row: Tagged, whole: bool) -> Encoded:
        raise NotImplementedError("tags are chosen word by word")

    def prompt(self, row: Tagged) -> list[int]:
        return self._text(row)[0]

    def _text(self, row: Tagged) -> tuple[list[int], list[int], int]:
        """The ids of a row's words, where the first of each stands, and how many special tokens close the text.

        Raises DataError for a word without a token of its own.
        """
        ids, begins, ends = self._spelling.plain(" ".join(row.tokens))
        around = [begin == end for begin, end in zip(begins, ends, strict=True)]  # what the tokenizer puts there
        firsts, start, token = list[int](), 0, 0
        for number, word in enumerate(row.tokens):
            end = start + len(word)
            while token < len(ids) and (around[token] or ends[token] <= start):
                token += 1
            if token == len(ids) or begins[token] >= end or (firsts and firsts[-1] == token):
                what = f"tokens[{number}]: the tokenizer makes no token of its own of `{word[:60]}`"
                raise DataError(f"{row.place}: {what}", "take the word and its tag out of the row")
            firsts.append(token)
            start = end + 1
        closing = next((n for n, one in enumerate(reversed(around)) if not one), 0)
        return ids, firsts, closing


def made(ids: Sequence[int], firsts: Sequence[int], tags: Sequence[int]) -> Encoded:
    """A prepared row."""
    end = len(ids) + 2 * len(tags)
    return Encoded(array("i", [*ids, *firsts, *tags]), ((end - len(tags), end),))
