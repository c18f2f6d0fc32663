"""Texts that spell a special token, as in `what does <|im_end|> do?`: the spelling is ordinary text, never the token.

Only what the chat template and the tokenizer write themselves is special. A user who could write the token that ends a
turn could speak for the assistant, and a row about special tokens would train them where none belongs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from peftctl.config.bounds import no_panic
from peftctl.data.formats import Message
from peftctl.data.marks import unused
from peftctl.data.specials import Specials, mapped, texts
from peftctl.data.template import special_ids
from peftctl.errors import DataError

Region = tuple[int, int]
"""Characters `[start, end)` of a text."""


class Tokens(NamedTuple):
    """A text as token ids, and where the characters of each begin and end [tokens]."""

    ids: list[int]
    begins: list[int]
    ends: list[int]


class Render(Protocol):
    def __call__(self, messages: Sequence[Message], *, tools: Sequence[Any] | None) -> str: ...


def refuse_slow(tokenizer: Any) -> None:
    """Raise DataError for a tokenizer that does not tell which characters its tokens stand for."""
    if not tokenizer.is_fast:
        hint = "take a model with a `tokenizer.json`, or convert its tokenizer"
        raise DataError("the tokenizer is a slow one: it does not tell which characters a token covers", hint)


class Spelling:
    """Finds and tokenises the special tokens that a row's own texts spell, for one tokenizer and template.

    Without `split` they are left to be what they spell: for texts that were rendered before.
    """

    def __init__(self, tokenizer: Any, template: str | None, split: bool = True) -> None:
        refuse_slow(tokenizer)
        self._tokenizer = tokenizer
        self.split = split
        self._specials = Specials(tokenizer, template)
        # A word the tokenizer does not know marks nothing, unless that token is `eos_token` too, as in GPT-2.
        self.special = special_ids(tokenizer) - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})

    def in_text(self, text: str) -> bool:
        """Whether a plain text spells special tokens."""
        return self._specials.anywhere.search(text) is not None

    def in_rendering(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, text: str, render: Render, place: str
    ) -> list[Region]:
        """Where `text`, which is `render(messages, tools)`, has special tokens that a message or a tool spells.

        What the template reads in an answer, such as the `</think>` that ends its thinking, is the template's. Raises
        DataError at `place` when the template changes such a text, so that its place is in doubt.
        """
        if not self.split:
            return []
        said = [*((self._specials.of(message), message) for message in messages), (self._specials.anywhere, tools)]
        if not any(pattern.search(one) for pattern, value in said for one in texts(value)):
            return []
        (mark,) = unused(1, text, place)
        *marked, marked_tools = [_broken(value, pattern, mark) for pattern, value in said]
        rendered = render(marked, tools=marked_tools)
        if rendered.replace(mark, "") != text:
            what = "a text of this row spells a special token, and the chat template changes it"
            raise DataError(f"{place}: {what}", "remove the special token from the row")
        starts = [match.start() - number - 1 for number, match in enumerate(re.finditer(mark, rendered))]
        return [match.span() for start in starts if (match := self._specials.anywhere.match(text, start))]

    def tokenise(self, text: str) -> Tokens:
        """A text as the tokenizer reads it: what it spells of special tokens is special."""
        return self._read(text)

    def plain(self, text: str) -> Tokens:
        """A text of a row, with what the tokenizer puts around it; nothing in it is special, where that is split."""
        if not self.split:
            return self._read(text, add_special_tokens=True)
        tokens = self._read(text, add_special_tokens=True, split_special_tokens=True)
        if not any(id in self.special and begin < end for id, begin, end in zip(*tokens, strict=True)):
            return tokens
        out = Tokens([], [], [])
        for id, begin, end in zip(*tokens, strict=True):
            inside = id in self.special and begin < end
            ids = self._taken_apart(text[begin:end]) if inside else [id]
            _extend(out, ids, [begin] * len(ids), [end] * len(ids))
        return out

    def mixed(self, text: str, regions: Sequence[Region]) -> Tokens:
        """A rendering whose `regions` are ordinary text; the special tokens between them are special."""
        out, at = Tokens([], [], []), 0
        for start, end in (*regions, (len(text), len(text))):
            self._go_on(out, text[at:start], at, split_special_tokens=False)
            self._go_on(out, text[start:end], start, split_special_tokens=True)
            at = end
        return out

    def _go_on(self, out: Tokens, text: str, start: int, split_special_tokens: bool) -> None:
        """Adds the tokens of `text`, which begins at character `start`, to those before it."""
        if not text:
            return
        # At the start of a text, tokenizers such as Llama 2's put a space before it; so a line break stands there.
        lead = "\n" if start else ""
        line_break = self._read(lead, split_special_tokens=True).ids
        tokens = self._read(lead + text, split_special_tokens=split_special_tokens)
        if tokens.ids[: len(line_break)] != line_break:
            lead, line_break = "", []
            tokens = self._read(text, split_special_tokens=split_special_tokens)
        ids, begins, ends = (column[len(line_break) :] for column in tokens)
        if split_special_tokens and not self.special.isdisjoint(ids):
            ids = self._taken_apart(text)
            _extend(out, ids, [start] * len(ids), [start + len(text)] * len(ids))
            return
        _extend(out, ids, *([max(at - len(lead), 0) + start for at in column] for column in (begins, ends)))

    def _taken_apart(self, text: str) -> list[int]:
        """The ids of a special token's spelling where a vocabulary has it as a word, too: those of its parts."""
        for parts in ([text[:1], text[1:]], list(text)):
            ids = [id for part in parts for id in self._read(part, split_special_tokens=True).ids]
            if ids and self.special.isdisjoint(ids):
                return ids
        hint = "remove it from the rows"
        raise DataError(f"the tokenizer makes a special token of the ordinary text `{text.strip()}`", hint)

    def _read(self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False) -> Tokens:
        try:
            with no_panic():
                tokens = self._tokenizer(
                    text,
                    add_special_tokens=add_special_tokens,
                    split_special_tokens=split_special_tokens,
                    return_offsets_mapping=True,
                    truncation=False,
                    verbose=False,
                )
        except RuntimeError as error:
            what = f"the tokenizer gives up on a text of {len(text):,} characters: {str(error)[:200]}"
            raise DataError(what, "is its `tokenizer.json` damaged, or a stranger's?") from None
        offsets = tokens["offset_mapping"]
        return Tokens(tokens["input_ids"], [begin for begin, _ in offsets], [end for _, end in offsets])


def _extend(tokens: Tokens, *columns: Sequence[int]) -> None:
    for column, more in zip(tokens, columns, strict=True):
        column.extend(more)


def _broken(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """The structure with a mark behind the first character of every spelling in it."""
    return mapped(value, lambda said: pattern.sub(lambda match: match[0][:1] + mark + match[0][1:], said))
