"""What a row is: chat messages, a prompt with its completion, or plain text; and every way in which it can be wrong.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}      both texts, or both lists of messages
    {"text": "..."}

Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftctl.config.near import did_you_mean
from peftctl.data.dataset import Format
from peftctl.data.file import Row
from peftctl.errors import DataError, Problem

Message = dict[str, Any]
"""`role` and `content`, and what else the chat template may read, such as `reasoning_content`."""

ROLES = ("system", "user", "assistant")
_KEYS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_FOREIGN = {
    "conversations": "ShareGPT rows are not supported yet: rename `conversations` to `messages`, `from` to `role` "
    "(human: user, gpt: assistant), `value` to `content`",
    "instruction": "Alpaca rows are not supported yet: join `instruction` and `input` into `prompt`, "
    "rename `output` to `completion`",
    "chosen": "preference rows are not supported yet",
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the assistant's turns from message `first` on are trained."""

    place: str
    messages: list[Message]
    first: int = 0
    tools: Sequence[Any] | None = None
    """JSON schemas of the functions that the assistant may call."""

    flags: tuple[bool, ...] | None = None
    """Of each message, whether it may be trained."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A text to go on from, and how; the completion is trained."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; all of it is trained."""

    place: str
    text: str


Parsed = Chat | Pair | Text


def guess(row: Row) -> Format:
    """What a row seems to be, from its keys. Raises DataError when it is nothing we know."""
    for format, keys in _KEYS.items():
        if all(row.value.get(key) is not None for key in keys):
            return format
    names = ", ".join(f"`{key[:40]}`" for key in list(row.value)[:8]) or "none"
    known = "`messages`, or `prompt` and `completion`, or `text`"
    raise DataError(f"{row.place}: expected {known}; got the keys {names}", _near_key(row, list(_KEYS)))


def check(row: Row, format: Format) -> Parsed:
    """The row as `format`. Raises DataError with all that is wrong with it."""
    problems = list(_missing(row, format))
    if not problems:
        parsed = _PARSERS[format](row, problems)
        if not problems:
            return parsed
    raise DataError.of(problems)


def _missing(row: Row, format: Format) -> Iterator[Problem]:
    for key in _KEYS[format]:
        if row.value.get(key) is None:
            what = "is null" if key in row.value else "is missing"
            yield Problem(f"{row.place}: `{key}` {what}", _near_key(row, [format]))


def _near_key(row: Row, formats: list[Format]) -> str | None:
    for key in row.value:
        if key in _FOREIGN:
            return _FOREIGN[key]
    wanted = [key for format in formats for key in _KEYS[format] if key not in row.value]
    for key in row.value:
        if hint := did_you_mean(key, wanted):
            return f"`{key}`: {hint}"
    return None


def _chat(row: Row, problems: list[Problem]) -> Parsed:
    messages = _messages(row.value["messages"], f"{row.place}: messages", problems)
    if not problems:
        problems += _ends(messages, f"{row.place}: messages")
    return Chat(row.place, messages)


def _pair(row: Row, problems: list[Problem]) -> Parsed:
    prompt, completion = row.value["prompt"], row.value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, f"{row.place}: prompt", problems)
        after = _messages(completion, f"{row.place}: completion", problems)
        if not problems:
            problems += _ends(after, f"{row.place}: completion")
        return Chat(row.place, before + after, first=len(before))
    for key, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            text = f"{row.place}: {key}: expected a text; got {_kind(value)}"
            problems.append(Problem(text, "`prompt` and `completion` are both texts or both lists of messages"))
    if completion == "":
        problems.append(Problem(f"{row.place}: completion: is empty"))
    return Pair(row.place, prompt, completion)


def _text(row: Row, problems: list[Problem]) -> Parsed:
    text = row.value["text"]
    if not isinstance(text, str):
        problems.append(Problem(f"{row.place}: text: expected a text; got {_kind(text)}"))
    elif not text.strip():
        problems.append(Problem(f"{row.place}: text: is empty"))
    return Text(row.place, text)


_PARSERS = {"messages": _chat, "prompt_completion": _pair, "text": _text}


def _messages(value: object, place: str, problems: list[Problem]) -> list[Message]:
    if not isinstance(value, list):
        problems.append(Problem(f"{place}: expected a list of messages; got {_kind(value)}"))
        return []
    if not value:
        problems.append(Problem(f"{place}: no messages"))
    for index, message in enumerate(value):
        if isinstance(message, dict):
            problems += _wrong(message, f"{place}[{index}]")
        else:
            problems.append(Problem(f"{place}[{index}]: expected `role` and `content`; got {_kind(message)}"))
    return value


def _wrong(message: Message, place: str) -> Iterator[Problem]:
    for key in ("role", "content"):
        value = message.get(key)
        if value is None:
            foreign = {"role": "from", "content": "value"}[key]
            near = _FOREIGN["conversations"] if foreign in message else None
            near = near or next((hint for other in message if (hint := did_you_mean(other, [key]))), None)
            yield Problem(f"{place}: `{key}` {'is null' if key in message else 'is missing'}", near)
        elif not isinstance(value, str):
            hint = "images and other parts are not supported yet" if isinstance(value, list) else None
            yield Problem(f"{place}.{key}: expected a text; got {_kind(value)}", hint)
        elif key == "role" and value not in ROLES:
            hint = did_you_mean(value, ROLES) or "roles are `system`, `user` and `assistant`"
            yield Problem(f"{place}.role: unknown role `{value[:40]}`", hint)
    if message.get("tool_calls"):
        yield Problem(f"{place}: `tool_calls` are not supported yet")
    for key in ("train", "weight"):
        if message.get(key) in (False, 0):
            yield Problem(f"{place}.{key}: turns cannot be left out of training yet", "remove the key or the turn")


def _ends(messages: list[Message], place: str) -> Iterator[Problem]:
    last = messages[-1]
    if last["role"] != "assistant":
        hint = "only the assistant's turns are trained, so a conversation ends with one"
        yield Problem(f"{place}: the last message is the {last['role']}'s, not the assistant's", hint)
    elif not last["content"].strip() and len(last) == 2:
        yield Problem(f"{place}[{len(messages) - 1}].content: the answer is empty")


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
