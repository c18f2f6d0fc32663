"""Private characters put into a conversation, so that its rendering tells where a text of it came out.

A mark is a character that no text means anything by. A rendering with marks is believed only when it is, marks taken
out, the rendering without them, and when each mark came out once: then the template did not look at what was marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from peftctl.data.formats import Message
from peftctl.errors import DataError

FIRST, LAST = 0xF0000, 0xFFFFD  # the first of Unicode's planes for private use


def unused(number: int, text: str, place: str) -> list[str]:
    """That many characters for private use that `text` does not have. Raises DataError when it has nearly all."""
    private = (chr(code) for code in range(FIRST, LAST + 1))
    if not text.isascii() and max(text) >= chr(FIRST):
        taken = set(text)
        private = (mark for mark in private if mark not in taken)
    marks = list(islice(private, number))
    if len(marks) < number:
        raise DataError(f"{place}: the conversation uses all characters for private use from U+F0000 to U+FFFFD")
    return marks


def found(rendered: str, text: str, marks: Sequence[str]) -> list[int] | None:
    """Where each mark of `rendered` stands in `text`, which is the same without marks; None when that is not so."""
    at = [rendered.find(mark) for mark in marks]
    bare = rendered
    for mark in marks:
        bare = bare.replace(mark, "")
    if bare != text or len(rendered) != len(text) + len(marks) or min(at) < 0:
        return None
    order = {position: earlier for earlier, position in enumerate(sorted(at))}
    return [position - order[position] for position in at]


def behind(message: Message, mark: str) -> Iterator[Message]:
    """The message with a mark behind the last thing that is said in it, in the order of preference.

    That is its content, trailing space left out; where it calls tools, the last call's last argument or its name: what
    the template writes between the mark and the end of the turn is its own.
    """
    if message.get("tool_calls"):
        *calls, last = message["tool_calls"]
        for changed in _call_marked(last, mark):
            yield {**message, "tool_calls": [*calls, changed]}
    else:
        content = message["content"]
        cut = len(content.rstrip())
        yield {**message, "content": content[:cut] + mark + content[cut:]}


def before(message: Message, mark: str) -> Iterator[Message]:
    """The message with a mark before the first thing that is said in it: its content or its first call's name."""
    content, calls = message.get("content") or "", message.get("tool_calls")
    if calls and not content.strip():
        for changed in _named(calls[0], mark, front=True):
            yield {**message, "tool_calls": [changed, *calls[1:]]}
    else:
        cut = len(content) - len(content.lstrip())
        yield {**message, "content": content[:cut] + mark + content[cut:]}


def _call_marked(call: dict[str, Any], mark: str) -> Iterator[dict[str, Any]]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    named = isinstance(arguments, dict) and list(arguments)
    for marked in (
        _last_text(arguments, mark),
        {(key + mark if key == named[-1] else key): value for key, value in arguments.items()} if named else None,
    ):
        if marked is not None:
            changed = {**function, "arguments": marked}
            yield {**call, "function": changed} if "function" in call else changed
    yield from _named(call, mark, front=False)


def _named(call: dict[str, Any], mark: str, front: bool) -> Iterator[dict[str, Any]]:
    function = call.get("function", call)
    name = function.get("name")
    if isinstance(name, str):
        changed = {**function, "name": mark + name if front else name + mark}
        yield {**call, "function": changed} if "function" in call else changed


def _last_text(value: Any, mark: str) -> Any:
    """`value` with a mark behind the last text in it; None when there is none."""
    if isinstance(value, str):
        return value + mark
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in reversed(list(items)):
        marked = _last_text(inner, mark)
        if marked is not None:
            changed = dict(value) if isinstance(value, dict) else list(value)
            changed[key] = marked
            return changed
    return None
