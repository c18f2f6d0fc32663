"""What can be wrong between the texts of rows and their tokens: rows are rendered and tokenised anew, and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from peftctl.data.checks import Check, counted
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.formats import Chat, Pair, Parsed
from peftctl.data.inspection import SHOWN
from peftctl.data.specials import Specials, mapped, texts
from peftctl.data.template import render, special_ids
from peftctl.data.visible import decoded
from peftctl.errors import DataError

AROUND = 24
"""Characters that are shown of each of two texts where they differ."""


def of_rendering(rows: Sequence[tuple[Parsed, Sequence[Encoded]]], encoder: Encoder) -> Check:
    """Whether tokens are those of the tokenizer's own rendering, decode to its text and are what was prepared."""
    name, spelling = "rendering", Spelled(encoder)
    lossy = None
    for row, pieces in rows:
        whole = encoder.whole(row)
        said, own = _own(row, encoder)
        if not spelling.in_row(row) and own != whole.input_ids:
            at = _first_difference(own, whole.input_ids)
            text = (
                f"token {at} is {_token(whole.input_ids, at, encoder)}, and the tokenizer's {_token(own, at, encoder)}"
            )
            return Check(name=name, state="failed", text=text, hint="this is a bug in peftctl", places=(row.place,))
        anew = encoder.encode(row)
        if [(piece.input_ids, piece.spans) for piece in anew] != [(piece.input_ids, piece.spans) for piece in pieces]:
            text = "the prepared row is not what the row gives now"
            hint = "the data, the tokenizer or today's date in the template changed: prepare anew"
            return Check(name=name, state="failed", text=text, hint=hint, places=(row.place,))
        read = decoded(whole.ids.tolist(), encoder.tokenizer)
        unknown = encoder.tokenizer.unk_token_id in whole.ids
        if lossy is None and not unknown and not _alike(read, said, encoder.tokenizer):
            lossy = (row.place, difference(said, read))
    looked = f"{counted(len(rows), 'row')} compared"
    if lossy is not None:
        text = f"tokens do not decode to the text that they are made from: {lossy[1]}"
        hint = "the tokenizer changes such characters, so the model never sees them"
        return Check(name=name, state="warning", text=text, hint=hint, places=(lossy[0],))
    return Check(name=name, state="ok", text=f"tokens are the tokenizer's own and decode to the text ({looked})")


def of_template(rows: Sequence[Parsed], encoder: Encoder, own: str | None) -> Check:
    """Whether conversations are rendered as the tokenizer's own template `own` does it."""
    name = "chat template"
    chats = [encoder.with_system(row) for row in rows if isinstance(row, Chat)]
    if not chats and own is not None and any(isinstance(row, Pair) for row in rows):
        text = "the tokenizer has one, and pairs of texts are trained without it"
        hint = "where the model is to be asked in chats, give `prompt` and `completion` as lists of messages"
        return Check(name=name, state="warning", text=text, hint=hint)
    if encoder.template is None or not chats:
        return Check(name=name, state="ok", text="no conversations, so none is used")
    if own is None:
        return Check(name=name, state="ok", text="the tokenizer has none of its own to compare with")
    if own == encoder.template:
        return Check(name=name, state="ok", text="the tokenizer's own")
    hint = "keep the tokenizer's own (`chat_template: tokenizer`) unless the base was never trained with it"
    for chat in chats:
        ours = render(chat.messages, encoder.tokenizer, encoder.template, chat.place, tools=chat.tools)
        try:
            theirs = render(chat.messages, encoder.tokenizer, own, chat.place, tools=chat.tools)
        except DataError:
            text = "not the tokenizer's own, which refuses this conversation"
            return Check(name=name, state="warning", text=text, hint=hint, places=(chat.place,))
        if ours != theirs:
            text = f"not the tokenizer's own: {difference(theirs, ours)}"
            return Check(name=name, state="warning", text=text, hint=hint, places=(chat.place,))
    text = f"another text than the tokenizer's own, with the same result ({counted(len(chats), 'row')} compared)"
    return Check(name=name, state="ok", text=text)


def of_spelling(rows: Sequence[Parsed], spelled: int, encoder: Encoder) -> Check:
    """Whether special tokens that the texts of rows spell stay text; `rows` are some of the `spelled` that do.

    Without those spellings a row must have as many special tokens of every kind.
    """
    name, spelling = "special tokens in text", Spelled(encoder)
    if spelled and not encoder.splits_special_tokens:
        text = f"{counted(spelled, 'row')} with special tokens spelled in the text, taken as what they spell"
        hint = "that is right for texts that were rendered before; else leave `split_special_tokens` out"
        return Check(name=name, state="warning", text=text, hint=hint, places=tuple(row.place for row in rows[:SHOWN]))
    special = special_ids(encoder.tokenizer) - {encoder.tokenizer.unk_token_id}
    taken = []
    for row in rows:
        with suppress(DataError):
            plain = encoder.whole(spelling.without(row))
            if _count(encoder.whole(row), special) != _count(plain, special):
                taken.append(row.place)
    if taken:
        text = f"{counted(len(taken), 'row')} with special tokens that a text spells, taken as special"
        hint = "remove them from the rows; this is a bug in peftctl"
        return Check(name=name, state="failed", text=text, hint=hint, places=tuple(taken[:SHOWN]))
    if not spelled:
        return Check(name=name, state="ok", text="no text spells a special token")
    looked = "" if len(rows) == spelled else f" ({len(rows):,} compared)"
    text = f"{counted(spelled, 'row')} with special tokens spelled in the text, where they stay text{looked}"
    return Check(name=name, state="ok", text=text, places=tuple(row.place for row in rows[:SHOWN]))


class Spelled:
    """Special tokens that the texts of rows spell."""

    def __init__(self, encoder: Encoder) -> None:
        self._specials = Specials(encoder.tokenizer, encoder.template)
        self._any = self._specials.anywhere

    def in_row(self, row: Parsed) -> bool:
        """Whether a text of the row spells one."""
        if not isinstance(row, Chat):
            return any(map(self._any.search, [row.prompt, row.completion] if isinstance(row, Pair) else [row.text]))
        said = [text for message in row.messages for text in texts(message) if self._specials.of(message).search(text)]
        return bool(said) or any(self._any.search(text) for text in texts(row.tools))

    def without(self, row: Parsed) -> Parsed:
        """The row with a letter in the place of each."""
        if isinstance(row, Pair):
            return replace(row, prompt=self._any.sub("x", row.prompt), completion=self._any.sub("x", row.completion))
        if not isinstance(row, Chat):
            return replace(row, text=self._any.sub("x", row.text))
        messages = [
            {**mapped(message, partial(self._specials.of(message).sub, "x")), "role": message["role"]}
            for message in row.messages
        ]
        return replace(row, messages=messages, tools=mapped(row.tools, partial(self._any.sub, "x")))


def difference(wanted: str, found: str) -> str:
    """Where two texts differ first, and what stands there in both."""
    at = _first_difference(wanted, found)
    here = f"at character {at} of the text"
    return f"{here} `{_cut(found, at)}` instead of `{_cut(wanted, at)}`"


def _cut(text: str, at: int) -> str:
    """What stands in a text from a place on, as one line, and what comes before it if that is the end."""
    return text[at : at + AROUND].replace("\n", "\\n") or "(its end)"


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _own(row: Parsed, encoder: Encoder) -> tuple[str, list[int]]:
    """The text of a row and its ids, as the tokenizer alone makes them."""
    tokenizer: Any = encoder.tokenizer
    if isinstance(row, Chat):
        chat = encoder.with_system(row)
        text = render(chat.messages, tokenizer, encoder.template or "", chat.place, tools=chat.tools)
        ids = tokenizer.apply_chat_template(
            list(chat.messages),
            tools=None if chat.tools is None else list(chat.tools),
            chat_template=encoder.template,
            tokenize=True,
            return_dict=False,
        )
        return text, list(ids)
    text = row.prompt + row.completion if isinstance(row, Pair) else row.text
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    around = decoded(list(tokenizer("", verbose=False)["input_ids"]), tokenizer)
    ids += [tokenizer.eos_token_id] * (not ids or ids[-1] != tokenizer.eos_token_id)
    end = decoded([tokenizer.eos_token_id], tokenizer)
    return around.removesuffix(end) + text + end, ids


def _alike(read: str, said: str, tokenizer: Any) -> bool:
    """Whether decoding gives a text back, up to what its tokenizer does to every text: a first space, normal forms."""
    normalizer = getattr(tokenizer.backend_tokenizer, "normalizer", None)
    for form in (said, normalizer.normalize_str(said) if normalizer else said):
        if read.replace(" ", "") == form.replace(" ", "").replace("\u2581", ""):
            return True
    return False


def _count(row: Encoded, special: frozenset[int]) -> Counter[int]:
    return Counter(id for id in row.input_ids if id in special)


def _token(ids: Sequence[int], at: int, encoder: Encoder) -> str:
    return f"`{encoder.tokenizer.convert_ids_to_tokens(ids[at])}` ({ids[at]})" if at < len(ids) else "missing"
