"""Where each speaker's turns are in a rendered conversation, found by rendering, never by searching for words.

A turn of the assistant starts where generation would: after the rendering of the messages before it with the generation
prompt, which must open the whole rendering. What is said ends where a mark put behind it comes out, so that repeated,
empty and stripped answers, tool calls and templates that drop earlier thinking all have one rule. Turns of other roles
go from mark to mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from peftctl.data.formats import Message
from peftctl.data.places import OTHER_TEMPLATE, Places, Render
from peftctl.errors import DataError


class Turn(NamedTuple):
    """One trained turn, in characters of the rendering: a header, what must be learned, and in it what is said.

    The first special token from `said_end` on closes the turn; it must end at `limit` or before. Behind a tool call,
    special tokens of the call itself may come first.
    """

    message: int
    role: str
    header: int
    start: int
    said_end: int
    limit: int
    calls: bool


class Turns:
    """Finds turns in the renderings of one chat template."""

    def __init__(self) -> None:
        self._asked: set[str] = set()  # what the template was seen to write to ask for an answer

    def find(
        self, messages: Sequence[Message], trained: Sequence[int], text: str, render: Render, place: str
    ) -> list[Turn]:
        """The turns of the messages `trained`, in their order; `text` is `render(messages)`.

        Raises DataError at `place` where the template leaves the place of a turn in doubt.
        """
        places = Places(messages, text, render, place)
        spoken = [i for i in trained if messages[i]["role"] == "assistant"]
        others = [i for i in trained if messages[i]["role"] != "assistant"]
        calling = [i for i in spoken if messages[i].get("tool_calls")]
        bounded = {i for i in (*others, *calling) if i + 1 < len(messages)}
        places.look(begins=[*others, *(i + 1 for i in sorted(bounded))], ends=trained)
        heads = {i: self._head(places, i) if i in spoken else (places.begin(i),) * 2 for i in trained}
        turns = []
        for i in trained:
            limit = next((heads[j][0] for j in spoken if j > i), len(text))
            if i in bounded:
                limit = min(limit, heads[i + 1][0] if i + 1 in spoken else self._before(places, i + 1, limit))
            turns.append(Turn(i, messages[i]["role"], *heads[i], places.end(i), limit, i in calling))
        return turns

    def _before(self, places: Places, index: int, otherwise: int) -> int:
        """Where the message before must end: at the header of message `index`, if it is known, or its first word."""
        if places.messages[index]["role"] == "assistant":
            with suppress(DataError):
                return self._head(places, index)[0]
        return places.begin_or(index, otherwise)

    def _head(self, places: Places, index: int) -> tuple[int, int]:
        """Where the header of the assistant's message `index` begins, and where what must be learned begins."""
        if index == 0:  # no template renders an empty conversation, so there is no generation prompt to compare with
            return places.begin(index), places.begin(index)
        text, before = places.text, places.messages[:index]
        prompt = places.render(before, add_generation_prompt=True)
        opens = text.startswith(prompt)
        known = max(filter(prompt.endswith, self._asked), key=len, default="") if opens else ""
        if known:
            return len(prompt) - len(known), len(prompt)
        bare = places.render(before)
        header = _shared(bare, prompt)
        if opens and prompt != bare:
            if header == len(bare):
                self._asked.add(prompt[header:])
            return header, len(prompt)
        # No header at all, as in Llama 2; or the generation prompt goes on where answers do not, as with a `<think>`
        # that they lack or close at once. The prompt is what both agree on, if nothing but that stands before the
        # answer. The opening of a call belongs to the answer: there, a plain answer shows what else stands before it.
        calls = places.messages[index].get("tool_calls")
        for lead, answer in places.plain(index) if calls else [(text, places.begin(index))]:
            start = min(_shared(prompt, text), _shared(lead, text), answer)
            if lead[start:answer].strip() in ("", "</think>"):
                return min(header, start), start
        if (found := _asked_alike(places, index, bare, prompt)) is not None:
            return found
        what = "the chat template writes other text before this answer than when it asks for one"
        hint = f"{OTHER_TEMPLATE}, or make it honour `add_generation_prompt`"
        text = f"{places.place}: messages[{index}]: {what}, so generating would not meet the training"
        raise DataError(text, hint)


def _asked_alike(places: Places, index: int, bare: str, prompt: str) -> tuple[int, int] | None:
    """The head of a turn that the template asks for alike, though it writes earlier answers otherwise once more follow.

    So do templates that keep the thinking between the calls of tools until the user speaks again. What they write to
    ask for an answer must stand between the words of the message before and the answer.
    """
    asked, differs = prompt.removeprefix(bare), _shared(bare, places.text)
    if next((m["role"] for i, m in enumerate(places.messages) if places.end_or(i, 0) > differs), "") != "assistant":
        return None
    answer = places.begin_or(index, 0)
    between = places.text[places.end_or(index - 1, answer) : answer]
    header = asked.partition("<think>")[0]
    if not header.strip() or between.count(header) != 1:
        return None
    at = answer - len(between) + between.index(header)
    start = at + len(asked if places.text.startswith(asked, at) else header)
    thought = places.text[start:answer].replace("<think>", "").strip()
    alike = start - at == len(asked) or thought in ("", "</think>") or places.messages[index].get("tool_calls")
    return (at, start) if alike else None


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if b.startswith(a):  # nearly always, and much faster
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
