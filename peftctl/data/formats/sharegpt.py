"""`{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`, as ShareGPT wrote it.

`function_call` turns hold the call as JSON text. Turns may as well have `role` and `content`.
"""

from __future__ import annotations

from typing import Any

from peftctl.config.near import did_you_mean
from peftctl.config.quote import quoted
from peftctl.data.file import Row
from peftctl.data.formats.conversation import answered, flags, text_of
from peftctl.data.formats.form import Form, Problems, kind, optional_text
from peftctl.data.formats.kinds import Chat, Message
from peftctl.data.formats.tool_calls import calls, tools, unpacked
from peftctl.errors import Problem

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Who speaks, and the role that is."""

_CALLING = ("function_call", "tool_call")


def read(row: Row, problems: Problems) -> Chat:
    turns, place = row.value["conversations"], f"{row.place}: conversations"
    system = optional_text(row, "system", problems)
    offered = tools(row.value.get("tools"), f"{row.place}: tools", problems)
    if not isinstance(turns, list):
        problems.append(Problem(f"{place}: expected a list of turns; got {kind(turns)}"))
        return Chat(row.place, [])
    if not turns:
        problems.append(Problem(f"{place}: no turns"))
    said = [_message(turn, f"{place}[{index}]", problems) for index, turn in enumerate(turns)]
    flagged = flags(turns, place, problems)
    if not problems:
        problems += answered(said, place)
        if system and said[0]["role"] == "system":
            problems.append(Problem(f"{row.place}: system: the first turn is a system message too", "remove one"))
    if system:
        said = [{"role": "system", "content": system}, *said]
        flagged = flagged and (True, *flagged)
    return Chat(row.place, said, tools=offered, flags=flagged)


def _message(turn: object, place: str, problems: Problems) -> Message:
    if not isinstance(turn, dict):
        problems.append(Problem(f"{place}: expected `from` and `value`; got {kind(turn)}"))
        return {}
    who, what = ("from", "value") if "from" in turn or "role" not in turn else ("role", "content")
    for key in (who, what):
        if turn.get(key) is None:
            hint = next((hint for other in turn if (hint := did_you_mean(other, [key]))), None)
            problems.append(Problem(f"{place}: `{key}` {'is null' if key in turn else 'is missing'}", hint))
    speaker, value = turn.get(who), turn.get(what)
    if speaker is None or value is None:
        return {}
    if not isinstance(speaker, str):
        problems.append(Problem(f"{place}.{who}: expected a text; got {kind(speaker)}"))
        return {}
    if speaker.casefold() not in SPEAKERS:
        hint = (
            did_you_mean(speaker, SPEAKERS)
            or "speakers are `system`, `human`, `gpt`, `function_call` and `observation`"
        )
        problems.append(Problem(f"{place}.{who}: unknown speaker {quoted(speaker)}", hint))
    elif speaker.casefold() in _CALLING:
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, f"{place}.{what}", problems)}
    return {"role": SPEAKERS.get(speaker.casefold()), "content": text_of(value, f"{place}.{what}", problems)}


def _calls(value: Any, place: str, problems: Problems) -> list[dict[str, Any]]:
    value = unpacked(value, place, problems)
    made = calls(value if isinstance(value, list) else [value], place, problems)
    if not made and not problems:
        problems.append(Problem(f"{place}: no call"))
    return made


SHAREGPT = Form(name="sharegpt", required=("conversations",), optional=("system", "tools"), read=read)
