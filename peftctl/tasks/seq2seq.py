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
from peftctl.data.spelling import Spelling, Tokens
from peftctl.data.supervised import one_exchange
from peftctl.engine.attach import takes
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError, ModelError
from peftctl.models.head import SEQ2SEQ, Head
from peftctl.tasks.languages import of_languages, opening
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
    source_language: str = ""
    """The language of the sources, in the tokenizer's own code: `en_XX` of mBART, `eng_Latn` of NLLB."""
    target_language: str = ""
    """That of the targets. Only tokenizers with a token for each language have the two."""

    @property
    def head(self) -> Head:
        return SEQ2SEQ

    def imitated(self) -> Task:
        return replace(self, source_language="", target_language="")

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
        both = of_languages(tokenizer, task.source_language, task.target_language)
        self._sources, self._targets = (Spelling(one, None, dataset.split_special_tokens) for one in both)
        self.opening = opening(both[1], task.target_language)

    @property
    def splits_special_tokens(self) -> bool:
        """Whether special tokens that a text spells are ordinary text."""
        return self._sources.split

    def encode(self, row: Translated) -> list[Encoded]:
        """A row; none when it is too long and dropped. Raises DataError for one too long, or without a target."""
        self.spelled += self._sources.in_text(row.source) or self._targets.in_text(row.target)
        source, target = self._source(row), self._target(row)
        over = [(source, self.max_length), (target, self.max_target_length)]
        cut = sum(max(len(text.ids) - most, 0) for text, most in over)
        if cut and self.on_long == "drop":
            return []
        if cut and self.on_long == "error":
            text = f"{row.place}: source of {len(source.ids)} and target of {len(target.ids)} tokens: too long"
            raise DataError(text, "raise `dataset.max_length`, or choose `on_long: truncate` or `drop`")
        return [replace(together(*(shortened(*one) for one in over)), truncated=cut > 0, cut=cut)]

    def compared(self, row: Translated, whole: bool) -> Encoded:
        source, target = self._source(row), self._target(row)
        if len(source.ids) > self.max_length or len(target.ids) > self.max_target_length:
            raise DataError(f"{row.place}: too long to compare its labels", "raise `dataset.max_length`")
        encoded = together(source.ids, target.ids)
        return encoded if whole else encoded.without_end()

    def prompt(self, row: Translated) -> list[int]:
        """The source as a prepared row has it, cut where it is too long."""
        return shortened(self._source(row), self.max_length)

    def _source(self, row: Translated) -> Tokens:
        return self._sources.plain(self.prefix + row.source)

    def _target(self, row: Translated) -> Tokens:
        tokens = self._targets.plain(row.target)
        if self.tokenizer.eos_token_id not in tokens.ids[-2:]:  # behind it mBART has the language
            end = len(row.target)
            return Tokens([*tokens.ids, self.tokenizer.eos_token_id], [*tokens.begins, end], [*tokens.ends, end])
        return tokens


def shortened(tokens: Tokens, most: int) -> list[int]:
    """The first `most` ids; a model expects the end of a text as the tokenizer puts it, so that stays."""
    ids = tokens.ids
    if len(ids) <= most:
        return ids
    put = [begin == end for begin, end in zip(tokens.begins, tokens.ends, strict=True)]
    closing = next((count for count, one in enumerate(reversed(put)) if not one), 0)
    return [*ids[: most - closing], *ids[len(ids) - closing :]]


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
