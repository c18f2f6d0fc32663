"""A parsed row as token ids, and which of them are trained.

Chat: the whole conversation is rendered and tokenised once, so the ids are those of the tokenizer's own rendering;
trained is, unless `train_on` says otherwise, every turn of the assistant from where generation would start through its
stop token, nothing else. Prompt and completion: one text, tokenised as the tokenizer does by default; the completion
and `eos_token` are trained. Text: everything and `eos_token`. The first token of a row is never trained: nothing stands
before it to predict it. A special token that a row's own text spells is ordinary text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from peftctl.data.dataset import Dataset, TrainOn
from peftctl.data.fitting import Encoded as Encoded
from peftctl.data.fitting import OnLong, Span, fit
from peftctl.data.formats import Chat, Message, Pair, Parsed, Text
from peftctl.data.masks import Stops, span_of, trained_messages, without
from peftctl.data.places import OTHER_TEMPLATE
from peftctl.data.spelling import Spelling, Tokens, refuse_slow
from peftctl.data.template import render
from peftctl.data.turns import Turns
from peftctl.errors import DataError

NEVER_STOPS = "the stop token is never trained"
TRAINS_NOTHING = "trains nothing"
"""What is wrong with a row, as its error says it."""


class Encoder:
    """Encodes rows for one tokenizer and one chat template.

    `stop_ids` gathers the tokens that were trained to end an answer: generation has to stop at them. `spelled` counts
    the rows whose own text spells a special token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        max_length: int,
        on_long: OnLong = "truncate",
        train_on: TrainOn = "assistant",
        system: str | None = None,
        split_special_tokens: bool = True,
    ) -> None:
        """`template` is the Jinja text that conversations are rendered with; None where there are none.

        Raises DataError for a tokenizer that cannot do it.
        """
        refuse_slow(tokenizer)
        if template is None and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token (`eos_token`) to train at the end of each text")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.on_long = on_long
        self.train_on = train_on
        self.system = system
        self.stop_ids: set[int] = set()
        self.spelled = 0
        self._spelling = Spelling(tokenizer, template, split_special_tokens)
        self._turns = Turns()
        self._usual: frozenset[int] | None = None
        self._stops = Stops(self._spelling.special, tokenizer.bos_token_id, tokenizer.eos_token_id, self._usual_stops)

    @property
    def splits_special_tokens(self) -> bool:
        """Whether special tokens that a text spells are ordinary text."""
        return self._spelling.split

    @classmethod
    def of(cls, dataset: Dataset, tokenizer: Any, template: str | None) -> Encoder:
        """The encoder that a recipe's block asks for."""
        return cls(
            tokenizer,
            template,
            dataset.max_length,
            dataset.on_long,
            dataset.train_on,
            dataset.system,
            dataset.split_special_tokens,
        )

    def encode(self, row: Parsed) -> list[Encoded]:
        """The row as it is trained: one, several where it is split, none where it is too long and dropped.

        Raises DataError for a row that cannot be rendered, is too long (`on_long: error`) or trains nothing.
        """
        return fit(self.whole(row), self.max_length, self.on_long, row.place)

    def whole(self, row: Parsed) -> Encoded:
        """The row, however long. Raises DataError for one that cannot be rendered or trains nothing."""
        ids, spans = self._chat(row) if isinstance(row, Chat) else self._plain(row)
        kept = tuple((max(start, 1), end) for start, end in spans if end > max(start, 1))
        if not kept:
            raise DataError(f"{row.place}: {TRAINS_NOTHING}")
        return Encoded(array("i", ids), kept)

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, place: str = "messages"
    ) -> list[int]:
        """The ids of a conversation up to where the assistant answers. Raises DataError without a chat template."""
        if self.template is None:
            raise DataError(f"{place}: there is no chat template to ask with", "set `dataset.chat_template`")
        chat = self.with_system(Chat(place, list(messages), tools=tools))
        return self._rendered(chat, add_generation_prompt=True)[1].ids

    def compared(self, row: Parsed, whole: bool) -> Encoded:
        """The row, to compare its answer with others; the token that ends it counts only if `whole`.

        Raises DataError for one that is too long: what is left of it would be another answer.
        """
        encoded = self.whole(row)
        if len(encoded) > self.max_length:
            raise DataError(f"{row.place}: too long to compare its labels", "raise `dataset.max_length`")
        return encoded if whole else encoded.without_end()

    def prompt(self, row: Parsed) -> list[int]:
        """The ids that a row's answer follows."""
        if isinstance(row, Chat):
            return self.chat_prompt(row.messages[:-1], row.tools, row.place)
        return self.text_prompt(row.prompt if isinstance(row, Pair) else row.text)

    def text_prompt(self, text: str) -> list[int]:
        """The ids of plain text to go on from; an end token that the tokenizer appends would end it, so it goes."""
        ids = self._spelling.plain(text).ids
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def with_system(self, chat: Chat) -> Chat:
        """The conversation as it is rendered: with the recipe's system message where it has none."""
        if self.system is None or any(message["role"] == "system" for message in chat.messages):
            return chat
        messages = [{"role": "system", "content": self.system}, *chat.messages]
        flags = None if chat.flags is None else (True, *chat.flags)
        return replace(chat, messages=messages, flags=flags, first=chat.first and chat.first + 1)

    def _rendered(self, chat: Chat, add_generation_prompt: bool = False) -> tuple[str, Tokens]:
        renders = partial(render, tokenizer=self.tokenizer, template=self.template or "", place=chat.place)
        asking = partial(renders, add_generation_prompt=add_generation_prompt)
        text = asking(chat.messages, tools=chat.tools)
        regions = self._spelling.in_rendering(chat.messages, chat.tools, text, asking, chat.place)
        self.spelled += bool(regions)
        return text, self._spelling.mixed(text, regions) if regions else self._spelling.tokenise(text)

    def _chat(self, chat: Chat) -> tuple[list[int], list[Span]]:
        assert self.template is not None, "a conversation needs a template"
        chat = self.with_system(chat)
        text, tokens = self._rendered(chat)
        renders = partial(render, tokenizer=self.tokenizer, template=self.template, place=chat.place, tools=chat.tools)
        wanted, spared = trained_messages(chat, self.train_on)
        turns = self._turns.find(chat.messages, sorted({*wanted, *spared}), text, renders, chat.place)
        spans = {}
        for turn in turns:
            spans[turn.message], stop = span_of(turn, tokens, self._stops)
            if turn.role == "assistant" and turn.message in wanted:
                if stop is None:
                    hint = f"no special token ends the answer, so the model would never learn to stop: {OTHER_TEMPLATE}"
                    raise DataError(f"{chat.place}: {NEVER_STOPS}", hint)
                self.stop_ids.add(stop)
        if self.train_on == "all":
            return tokens.ids, without((0, len(tokens.ids)), [spans[i] for i in spared])
        return tokens.ids, list(spans.values())

    def _usual_stops(self) -> frozenset[int]:
        """What ends plain answers with this template, inside a conversation and at its end."""
        if self._usual is None:
            plain = Encoder(self.tokenizer, self.template, self.max_length)
            said = [{"role": role, "content": "?"} for role in ("user", "assistant") * 2]
            with suppress(DataError):
                plain.whole(Chat("", said))
            self._usual = frozenset(plain.stop_ids | ({self.tokenizer.eos_token_id} - {None}))
        return self._usual

    def _plain(self, row: Pair | Text) -> tuple[list[int], list[Span]]:
        prompt, text = (row.prompt, row.prompt + row.completion) if isinstance(row, Pair) else ("", row.text)
        tokens = self._spelling.plain(text)
        self.spelled += self._spelling.in_text(text)
        ids, eos = tokens.ids, self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"{row.place}: the tokenizer has no end token (`eos_token`) to train after the text")
        if not ids or ids[-1] != eos:
            ids.append(eos)
        self.stop_ids.add(eos)
        if self.train_on == "all":
            return ids, [(0, len(ids))]
        # Tokens added around the text cover none of it: they come as (0, 0).
        first = next((i for i, end in enumerate(tokens.ends) if end > len(prompt)), len(ids) - 1)
        return ids, [(first, len(ids))]
