"""A parsed row as token ids, and which of them are trained.

Chat: the whole conversation is rendered and tokenised once, so the ids are those of the tokenizer's own rendering;
trained is every turn of the assistant from where generation would start through its stop token, nothing else.
Prompt and completion: one text, tokenised as the tokenizer does by default; the completion and `eos_token` are trained.
Text: everything and `eos_token`. The first token of a row is never trained: nothing stands before it to predict it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

from peftctl.data.dataset import Dataset
from peftctl.data.fitting import IGNORED as IGNORED
from peftctl.data.fitting import Encoded as Encoded
from peftctl.data.fitting import OnLong, fit
from peftctl.data.formats import Chat, Pair, Parsed, Text
from peftctl.data.template import render, special_ids
from peftctl.data.turns import OTHER_TEMPLATE, Turn, trained_turns
from peftctl.errors import DataError


class Encoder:
    """Encodes rows for one tokenizer and one chat template.

    `stop_ids` gathers the tokens that were trained to end an answer: generation has to stop at them.
    """

    def __init__(self, tokenizer: Any, template: str | None, max_length: int, on_long: OnLong) -> None:
        """`template` is the Jinja text that conversations are rendered with; None where there are none.

        Raises DataError for a tokenizer that cannot do it.
        """
        if not tokenizer.is_fast:
            hint = "take a model with a `tokenizer.json`, or convert its tokenizer"
            raise DataError("the tokenizer is a slow one: it does not tell which characters a token covers", hint)
        if template is None and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token (`eos_token`) to train at the end of each text")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.on_long = on_long
        self.stop_ids: set[int] = set()
        # A word the tokenizer does not know marks nothing, unless that token is `eos_token` too, as in GPT-2.
        self._special = special_ids(tokenizer) - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})

    @classmethod
    def of(cls, dataset: Dataset, tokenizer: Any, template: str | None) -> Encoder:
        """The encoder that a recipe's block asks for."""
        return cls(tokenizer, template, dataset.max_length, dataset.on_long)

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
            raise DataError(f"{row.place}: trains nothing")
        return Encoded(array("i", ids), kept)

    def _chat(self, chat: Chat) -> tuple[list[int], list[tuple[int, int]]]:
        assert self.template is not None, "a conversation needs a template"
        rendered = partial(render, tokenizer=self.tokenizer, template=self.template, place=chat.place)
        text = rendered(chat.messages)
        ids, offsets = self._tokenise(text, add_special_tokens=False)
        begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
        return ids, [self._span(turn, ids, begins, ends, chat.place) for turn in trained_turns(chat, text, rendered)]

    def _span(
        self, turn: Turn, ids: Sequence[int], begins: Sequence[int], ends: Sequence[int], place: str
    ) -> tuple[int, int]:
        first = bisect_right(ends, turn.start)
        # A token that joins the end of the header to the beginning of the answer is the header's.
        first += first < len(ids) and begins[first] < turn.start
        opening = {self.tokenizer.bos_token_id, *ids[bisect_right(ends, turn.header) : first]}
        opening.discard(self.tokenizer.eos_token_id)
        stop = bisect_left(begins, turn.answer_end)
        while stop < len(ids) and ids[stop] not in self._special:
            stop += 1
        if stop < len(ids) and ends[stop] <= turn.limit and ids[stop] not in opening:
            self.stop_ids.add(ids[stop])
            return first, stop + 1
        hint = f"no special token ends the answer, so the model would never learn to stop: {OTHER_TEMPLATE}"
        raise DataError(f"{place}: the stop token is never trained", hint)

    def _plain(self, row: Pair | Text) -> tuple[list[int], list[tuple[int, int]]]:
        prompt, text = (row.prompt, row.prompt + row.completion) if isinstance(row, Pair) else ("", row.text)
        ids, offsets = self._tokenise(text, add_special_tokens=True)
        eos: int | None = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"{row.place}: the tokenizer has no end token (`eos_token`) to train after the text")
        if not ids or ids[-1] != eos:
            ids.append(eos)
        self.stop_ids.add(eos)
        # Tokens added around the text cover none of it: they come as (0, 0).
        first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids) - 1)
        return ids, [(first, len(ids))]

    def _tokenise(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        tokens = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return tokens["input_ids"], tokens["offset_mapping"]
