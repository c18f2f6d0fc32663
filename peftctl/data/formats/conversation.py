"""Messages of a conversation, checked one by one: who speaks, what is said, what is called, what may be trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftctl.config.near import did_you_mean
from peftctl.config.quote import quoted
from peftctl.data.formats.form import Problems, kind
from peftctl.data.formats.kinds import Message
from peftctl.data.formats.tool_calls import calls
from peftctl.errors import Problem

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What others call a role."""

Flags = tuple[bool, ...] | None
"""Of each message, whether it may be trained; None where all may."""

_SHAREGPT = {"role": "from", "content": "value"}


def messages(value: object, place: str, problems: Problems) -> tuple[list[Message], Flags]:
    """The messages of a row and their flags; what is wrong goes to `problems`, and then they are not to be used."""
    if not isinstance(value, list):
        problems.append(Problem(f"{place}: expected a list of messages; got {kind(value)}"))
        return [], None
    if not value:
        problems.append(Problem(f"{place}: no messages"))
    read = []
    for index, message in enumerate(value):
        if isinstance(message, dict):
            read.append(_message(message, f"{place}[{index}]", problems))
        else:
            problems.append(Problem(f"{place}[{index}]: expected `role` and `content`; got {kind(message)}"))
    return read, flags(value, place, problems)


def flags(turns: list[Any], place: str, problems: Problems) -> Flags:
    """Whether each turn may be trained: not where it has `train: false` or `weight: 0`."""
    found = []
    for index, turn in enumerate(turns):
        train, weight = (turn.get(key) for key in ("train", "weight")) if isinstance(turn, dict) else (None, None)
        if train is not None and not isinstance(train, bool):
            problems.append(Problem(f"{place}[{index}].train: expected true or false; got {kind(train)}"))
        if weight is not None and (isinstance(weight, str | list | dict) or weight not in (0, 1)):
            what = f"expected 0 or 1; got {weight if isinstance(weight, int | float) else kind(weight)}"
            problems.append(Problem(f"{place}[{index}].weight: {what}"))
        if isinstance(turn, dict) and turn.get("train_detail"):
            hint = "`train: false` leaves the whole turn out"
            problems.append(Problem(f"{place}[{index}].train_detail: parts of a turn cannot be left out", hint))
        found.append(train is not False and weight != 0)
    return None if all(found) else tuple(found)


def answered(said: list[Message], place: str) -> Iterator[Problem]:
    """What is wrong with the end of a conversation, whose messages are right one by one."""
    last = said[-1]
    if last["role"] != "assistant":
        hint = "only the assistant's turns are trained, so a conversation ends with one"
        yield Problem(f"{place}: the last message is the {last['role']}'s, not the assistant's", hint)
    elif not (last.get("content") or "").strip() and not any(last[key] for key in last.keys() - {"role", "content"}):
        yield Problem(f"{place}[{len(said) - 1}].content: the answer is empty")


def text_of(content: object, place: str, problems: Problems) -> object:
    """What is said: a text, or the texts of its parts joined."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            hint = "an object belongs into a text as JSON" if isinstance(content, dict) else None
            problems.append(Problem(f"{place}: expected a text; got {kind(content)}", hint))
        return content
    if not content:
        problems.append(Problem(f"{place}: no parts"))
    texts = []
    for index, part in enumerate(content):
        type_ = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if type_ == "text" and isinstance(text, str):
            texts.append(text)
        elif isinstance(type_, str) and type_ != "text":
            what = f"{place}[{index}]: a part of type {quoted(type_)}"
            problems.append(Problem(what, "a conversation has texts alone: images and sounds cannot be trained here"))
        else:
            hint = '`{"type": "text", "text": "..."}`, or a text instead of the list'
            problems.append(Problem(f"{place}[{index}]: expected a part with its type and text", hint))
    return "".join(texts)


def _message(message: dict[str, Any], place: str, problems: Problems) -> Message:
    read = {key: value for key, value in message.items() if key not in ("train", "weight") and value is not None}
    role = message.get("role")
    calling = message.get("tool_calls") is not None
    if calling:
        if isinstance(role, str) and role != "assistant":
            problems.append(Problem(f"{place}.tool_calls: only the assistant calls tools, and this is the {role}'s"))
        made = calls(message["tool_calls"], f"{place}.tool_calls", problems)
        read["tool_calls"] = made
        if not made:
            del read["tool_calls"]
    if role is None:
        problems.append(_missing("role", message, place))
    elif not isinstance(role, str):
        problems.append(Problem(f"{place}.role: expected a text; got {kind(role)}"))
    elif role not in ROLES:
        hint = f"`{ALIASES[role.casefold()]}` is its name here" if role.casefold() in ALIASES else None
        hint = hint or did_you_mean(role, ROLES) or "roles are `system`, `user`, `assistant` and `tool`"
        problems.append(Problem(f"{place}.role: unknown role {quoted(role)}", hint))
    if message.get("content") is not None:
        read["content"] = text_of(message["content"], f"{place}.content", problems)
    elif not read.get("tool_calls"):
        problems.append(_missing("content", message, place))
    else:
        read["content"] = None if "content" in message else ""  # templates read it in every message
    if message.get("function_call"):
        hint = '`tool_calls: [{"type": "function", "function": {"name": ..., "arguments": ...}}]` is read'
        problems.append(Problem(f"{place}: `function_call` is an old form", hint))
    return read


def _missing(key: str, message: dict[str, Any], place: str) -> Problem:
    hint = next((hint for other in message if (hint := did_you_mean(other, [key]))), None)
    if _SHAREGPT[key] in message:
        hint = "turns with `from` and `value` are ShareGPT's: call the list `conversations`, or set `format: sharegpt`"
    return Problem(f"{place}: `{key}` {'is null' if key in message else 'is missing'}", hint)
