"""Texts, or pairs of texts, into classes. The head is trained whole, beside the adapter.

    loss = - sum over rows of log p(label | text)

A prepared row is the text's ids, and behind them two numbers: where the second text begins, and the label, which is the
trained span.
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
from peftctl.data.formats import Chat, Example, Labelled, Pair
from peftctl.data.reading import RowEncoder
from peftctl.data.specials import Specials
from peftctl.data.spelling import refuse_slow
from peftctl.data.supervised import one_exchange
from peftctl.data.template import special_ids
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError
from peftctl.tasks.classifying import Classifying, number_of
from peftctl.tasks.task import Batch, register


@register
@dataclass(frozen=True, kw_only=True)
class Classification(Classifying):
    """A text, or a pair of texts, into one of a set of classes: by an encoder such as BERT, or by a decoder."""

    form: ClassVar[str] = "text_label"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")

    def accept(self, example: Example) -> Example:
        """A text and its label, a prompt and its completion, or one question and its answer, without instructions."""
        match example:
            case Labelled():
                return replace(example, label=self.named(example.label))
            case Pair():
                return Labelled(example.place, example.prompt, example.completion.strip())
            case Chat() if (exchange := one_exchange(example)) is not None:
                return Labelled(example.place, exchange[0], exchange[1].strip())
        hint = "rows are `text` and `label`; `columns: {text: tweet, label: sentiment}` maps other keys"
        raise DataError(
            f"{example.place}: `classification` trains texts with their labels, which this row is not", hint
        )

    def labels_of(self, example: Example) -> Iterable[str | int]:
        assert isinstance(example, Labelled)
        return [example.label]

    def asked(self, text: str, chat: bool) -> Example:
        return Labelled("text", text, self.labels[0])

    def worded(self, text: str, logits: Tensor) -> str:
        return self.labels[int(logits[0].argmax())]

    def tokens(self, row: Encoded) -> int:
        return len(row) - 2

    def legible(self, row: Encoded) -> tuple[Encoded, str]:
        return Encoded(row.ids[:-2], ()), f"label {self.labels[row.ids[-1]]}"

    def encoder(self, dataset: Dataset, tokenizer: Any, template: str | None) -> RowEncoder:
        if dataset.on_long == "split":
            raise DataError("dataset.on_long: a text and its label are not split", "use `truncate` or `drop`")
        return LabelEncoder(self.labels, dataset, tokenizer)

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """`input_ids`, `attention_mask` [rows, tokens] and `labels` [rows]; `token_type_ids` where there are pairs."""
        texts = [Encoded(row.ids[:-2], ()) for row in rows]
        batch = collate(texts, pad_id)
        labels = torch.tensor([row.ids[-1] for row in rows] or [IGNORED])
        seconds = torch.tensor([row.ids[-2] for row in rows] or [0])
        if all(int(begin) == len(text) for begin, text in zip(seconds, texts, strict=False)):
            return {**batch, "labels": labels}
        column = torch.arange(batch["input_ids"].shape[1])
        types = (column >= seconds[:, None]) & batch["attention_mask"].bool()
        return {**batch, "token_type_ids": types.long(), "labels": labels}


class LabelEncoder:
    """Encodes texts with their labels."""

    def __init__(self, labels: Sequence[str], dataset: Dataset, tokenizer: Any) -> None:
        refuse_slow(tokenizer)
        self.labels = list(labels)
        self.tokenizer, self.max_length = tokenizer, dataset.max_length
        self.on_long: OnLong = dataset.on_long
        self.stop_ids: set[int] = set()
        self.spelled = 0
        self.splits_special_tokens = dataset.split_special_tokens
        self._specials = Specials(tokenizer, None)
        self._special_ids = special_ids(tokenizer)

    def encode(self, row: Labelled) -> list[Encoded]:
        """A row; none when it is too long and dropped. Raises DataError for one too long, or with another label."""
        spelled = any(self._specials.anywhere.search(text) for text in (row.text, row.pair or ""))
        self.spelled += spelled
        encoded = self._whole(row)
        over = len(encoded) - 2 - self.max_length
        if over <= 0:
            return [encoded]
        if self.on_long == "drop":
            return []
        if self.on_long == "error":
            text = f"{row.place}: {len(encoded) - 2} tokens, more than `max_length` {self.max_length}"
            raise DataError(text, "raise `dataset.max_length`, or choose `on_long: truncate` or `drop`")
        return [replace(self._whole(row, self.max_length), truncated=True, cut=over)]

    def compared(self, row: Labelled, whole: bool) -> Encoded:
        encoded = self._whole(row)
        return encoded if len(encoded) - 2 <= self.max_length else self._whole(row, self.max_length)

    def prompt(self, row: Labelled) -> list[int]:
        return self._whole(row).ids.tolist()[:-2]

    def _whole(self, row: Labelled, most: int | None = None) -> Encoded:
        """The row, cut to `most` tokens as the tokenizer cuts: what it puts around a text stays."""
        label = number_of(row.label, self.labels, row.place)
        tokens = self.tokenizer(
            row.text,
            row.pair,
            split_special_tokens=self.splits_special_tokens,
            truncation=False if most is None else "longest_first",
            max_length=most,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = tokens["input_ids"]
        if not ids:
            raise DataError(f"{row.place}: the text has no token", "take the row out")
        if self.splits_special_tokens:
            inside = [id for id, (begin, end) in zip(ids, tokens["offset_mapping"], strict=True) if begin < end]
            if not self._special_ids.isdisjoint(set(inside) - {self.tokenizer.unk_token_id}):
                what = "the tokenizer makes a special token of what the text spells"
                raise DataError(f"{row.place}: {what}", "remove it from the row")
        types = tokens.get("token_type_ids", [])
        second = types.index(1) if row.pair is not None and 1 in types else len(ids)
        end = len(ids) + 2
        return Encoded(array("i", [*ids, second, label]), ((end - 1, end),))
