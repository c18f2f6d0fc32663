"""Encoder and decoder: translation, summarisation and whatever else writes one text from another.

    loss = - sum over tokens t of the target, its end token included, of log p(token t | source, tokens before t)

A prepared row is the source's ids and behind them the target's, the trained span; both are tokenised as the tokenizer
does by default.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftctl.config.block import Count
from peftctl.data.batches import collate
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.fitting import OnLong
from peftctl.data.formats import Chat, Example, Pair, Translated
from peftctl.data.reading import RowEncoder
from peftctl.data.spelling import Spelling
from peftctl.data.supervised import one_exchange
from peftctl.engine.attach import takes
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError, ModelError
from peftctl.models.head import SEQ2SEQ, Head
from peftctl.tasks.task import Batch, Task, register


@register
@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """One text from another, such as its translation or its summary, by a model with an encoder and a decoder."""

    talks: ClassVar[bool] = False
    measures: ClassVar[frozenset[str]] = frozenset({"truth", "labels", "text"})

    prefix: str = ""
    """What stands before every source, such as `summarize: ` for models that were taught by such words."""
    max_target_length: Count | None = None
    """Longest target, in tokens; `dataset.max_length`, which is that of the source, when left out."""

    @property
    def head(self) -> Head:
        return SEQ2SEQ

    def accept(self, example: Example) -> Example:
        """A source and its target, a prompt and its completion, or a question and its answer, without instructions."""
        match example:
            case Translated():
                return example
            case Pair():
                return Translated(example.place, example.prompt, example.completion)
            case Chat() if (exchange := one_exchange(example)) is not None:
                return Translated(example.place, *exchange)
            case Chat():
                hint = "rows have one message of the user and one of the assistant; `task: sft` trains conversations"
                raise DataError(f"{example.place}: a longer conversation is no source and target", hint)
        hint = "rows are `source` and `target`; `columns: {source: article, target: summary}` maps other keys"
        raise DataError(f"{example.place}: `seq2seq` trains one text from another, which this row has not", hint)

    def asked(self, text: str, chat: bool) -> Example:
        return Translated("text", text, "")

    def encoder(self, dataset: Dataset, tokenizer: Any, template: str | None) -> RowEncoder:
        if dataset.on_long == "split":
            raise DataError("dataset.on_long: a source and its target are not split", "use `truncate` or `drop`")
        if hasattr(tokenizer, "set_tgt_lang_special_tokens"):
            text = "the tokenizer writes each language with a token of its own, and nothing says which targets are in"
            raise DataError(text, "take a model without them, such as T5, mT5 or BART; mBART and NLLB are not trained")
        return SourceEncoder(self, dataset, tokenizer)

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """`input_ids` and `attention_mask` [rows, source], `labels` [rows, target], each padded on the right."""
        parts = [parted(row) for row in rows]
        batch = collate([source for source, _ in parts], pad_id)
        return {**batch, "labels": collate([target for _, target in parts], pad_id)["labels"]}

    def answers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        network: Any = getattr(model, "module", model)
        labels = batch["labels"]
        extra: dict[str, Any] = {"prompt_mask": batch["attention_mask"].bool()} if takes(model, "prompt_mask") else {}
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=shifted(labels, network),
            use_cache=False,
            **extra,
        ).logits
        wanted = labels != IGNORED
        return logits[wanted].float(), labels[wanted]


class SourceEncoder:
    """Encodes sources with their targets."""

    def __init__(self, task: Seq2Seq, dataset: Dataset, tokenizer: Any) -> None:
        self.tokenizer, self.max_length = tokenizer, dataset.max_length
        self.max_target_length = task.max_target_length or dataset.max_length
        self.on_long: OnLong = dataset.on_long
        self.prefix = task.prefix
        self.stop_ids: set[int] = {tokenizer.eos_token_id}
        self.spelled = 0
        self._spelling = Spelling(tokenizer, None, dataset.split_special_tokens)

    @property
    def splits_special_tokens(self) -> bool:
        """Whether special tokens that a text spells are ordinary text."""
        return self._spelling.split

    def encode(self, row: Translated) -> list[Encoded]:
        """A row; none when it is too long and dropped. Raises DataError for one too long, or without a target."""
        self.spelled += self._spelling.in_text(row.source) or self._spelling.in_text(row.target)
        source, target = self._source(row), self._target(row)
        over = [(ids, most) for ids, most in ((source, self.max_length), (target, self.max_target_length))]
        cut = sum(max(len(ids) - most, 0) for ids, most in over)
        if cut and self.on_long == "drop":
            return []
        if cut and self.on_long == "error":
            text = f"{row.place}: source of {len(source)} and target of {len(target)} tokens: too long"
            raise DataError(text, "raise `dataset.max_length`, or choose `on_long: truncate` or `drop`")
        return [replace(together(*(shortened(*one) for one in over)), truncated=cut > 0, cut=cut)]

    def compared(self, row: Translated, whole: bool) -> Encoded:
        source, target = self._source(row), self._target(row)
        if len(source) > self.max_length or len(target) > self.max_target_length:
            raise DataError(f"{row.place}: too long to compare its labels", "raise `dataset.max_length`")
        encoded = together(source, target)
        return encoded if whole else encoded.without_end()

    def prompt(self, row: Translated) -> list[int]:
        """The source as a prepared row has it, cut where it is too long."""
        return shortened(self._source(row), self.max_length)

    def _source(self, row: Translated) -> list[int]:
        return self._spelling.plain(self.prefix + row.source).ids

    def _target(self, row: Translated) -> list[int]:
        ids = self._spelling.plain(row.target).ids
        return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id]


def shortened(ids: list[int], most: int) -> list[int]:
    """The first `most` tokens; an encoder expects the end of a source as the tokenizer puts it, so that stays."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def together(source: Sequence[int], target: Sequence[int]) -> Encoded:
    """A source and its target as one row."""
    return Encoded(array("i", [*source, *target]), ((len(source), len(source) + len(target)),))


def parted(row: Encoded) -> tuple[Encoded, Encoded]:
    """The source and the target of a row."""
    ((start, end),) = row.spans
    return Encoded(row.ids[:start], ()), Encoded(row.ids[start:], ((0, end - start),))


def shifted(labels: Tensor, network: Any) -> Tensor:
    """What the decoder reads to predict `labels` [rows, target]: its start token, then all labels but the last.

    Most models say themselves which token that is: T5Gemma's is not where T5's is. Raises ModelError for one
    that has none.
    """
    try:
        if own := getattr(network, "prepare_decoder_input_ids_from_labels", None):
            read: Tensor = own(labels=labels)
            return read
        start = torch.full_like(labels[:, :1], network.config.decoder_start_token_id)
    except (TypeError, ValueError):
        text = f"{network.name_or_path}: `config.json` has no `decoder_start_token_id`"
        raise ModelError(text, "set it to the token that decoding begins with, such as `bos_token_id`") from None
    read = torch.cat([start, labels[:, :-1]], dim=1)
    return read.masked_fill(read == IGNORED, network.config.pad_token_id)
