"""Where the assistant speaks in a rendered conversation, found by rendering, never by searching for its words.

A turn starts where generation would: after the rendering of the messages before it with the generation prompt, which
must open the whole rendering. Its answer ends where a mark put behind the answer comes out, so that repeated, empty and
stripped answers, special tokens in the answer and templates that drop earlier thinking all have one rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from peftctl.data.formats import Chat, Message
from peftctl.errors import DataError

OTHER_TEMPLATE = "choose another `dataset.chat_template`"
_MARKS = [chr(code) for code in range(0xE000, 0xE100)]  # private use: no text means anything by them


class Render(Protocol):
    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str: ...


class Turn(NamedTuple):
    """One trained turn, in characters of the rendering: a header, what must be learned, and in it the answer.

    The first special token from `answer_end` on closes the turn; it must stand before `limit`.
    """

    header: int
    start: int
    answer_end: int
    limit: int


def trained_turns(chat: Chat, text: str, render: Render) -> list[Turn]:
    """The assistant's turns from message `chat.first` on; `text` is `render(chat.messages)`.

    Raises DataError where the template leaves the place of a turn in doubt.
    """
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise DataError(f"{chat.place}: the conversation uses all private characters from U+E000 to U+E0FF")
    spoken = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i >= chat.first]
    heads = [_head(chat, i, text, render, mark) for i in spoken]
    limits = [header for header, _ in heads[1:]] + [len(text)]
    ends = [_marked(chat, i, text, render, mark, behind=True) for i in spoken]
    return [Turn(*head, end, limit) for head, end, limit in zip(heads, ends, limits, strict=True)]


def _head(chat: Chat, index: int, text: str, render: Render, mark: str) -> tuple[int, int]:
    """Where the header of the assistant's message `index` begins, and where what must be learned begins."""
    if index == 0:  # no template renders an empty conversation, so there is no generation prompt to compare with
        answer = _marked(chat, index, text, render, mark, behind=False)
        return answer, answer
    bare = render(chat.messages[:index])
    prompt = render(chat.messages[:index], add_generation_prompt=True)
    header = _shared(bare, prompt)
    if prompt != bare and text.startswith(prompt):
        return header, len(prompt)
    # No header at all, as in Llama 2; or the generation prompt goes on where answers do not, as with a `<think>` that
    # they lack or close at once. The prompt is what both agree on, if nothing but that stands before the answer.
    answer = _marked(chat, index, text, render, mark, behind=False)
    start = min(_shared(prompt, text), answer)
    if text[start:answer].strip() not in ("", "</think>"):
        what = "the chat template writes other text before this answer than when it asks for one"
        hint = f"{OTHER_TEMPLATE}, or make it honour `add_generation_prompt`"
        raise DataError(f"{chat.place}: messages[{index}]: {what}, so generating would not meet the training", hint)
    return min(header, start), start


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if b.startswith(a):  # nearly always, and much faster
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _marked(chat: Chat, index: int, text: str, render: Render, mark: str, behind: bool) -> int:
    """Where the answer of message `index` ends in `text`, its trailing space left out; or begins, the same way."""
    message = chat.messages[index]
    content = message["content"]
    cut = len(content.rstrip()) if behind else len(content) - len(content.lstrip())
    marked = {**message, "content": content[:cut] + mark + content[cut:]}
    rendered = render([*chat.messages[:index], marked, *chat.messages[index + 1 :]])
    if rendered.replace(mark, "") != text or rendered.count(mark) != 1:
        what = "the chat template changes, repeats or leaves out this answer, so what to train is in doubt"
        raise DataError(f"{chat.place}: messages[{index}]: {what}", OTHER_TEMPLATE)
    return rendered.index(mark)
