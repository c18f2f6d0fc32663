"""Calls of tools and the tools themselves, in the form that OpenAI made usual; JSON written as a text is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from peftctl.config.quote import quoted
from peftctl.data.formats.form import Problems, kind
from peftctl.errors import Problem

_CALL = '`{"type": "function", "function": {"name": "...", "arguments": {...}}}`'


def calls(value: object, place: str, problems: Problems) -> list[dict[str, Any]]:
    """Calls as chat templates read them: the arguments as an object, whether or not they were JSON text."""
    value = unpacked(value, place, problems)
    if not isinstance(value, list):
        problems.append(Problem(f"{place}: expected a list of calls; got {kind(value)}", _CALL))
        return []
    return [made for i, call in enumerate(value) if (made := _call(call, f"{place}[{i}]", problems)) is not None]


def tools(value: object, place: str, problems: Problems) -> Sequence[Any] | None:
    """The JSON schemas of functions, given as a list or as JSON text; None where there are none."""
    if value is None or value == "":
        return None
    value = unpacked(value, place, problems)
    if not isinstance(value, list):
        problems.append(Problem(f"{place}: expected a list of functions; got {kind(value)}"))
        return None
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            problems.append(Problem(f"{place}[{index}]: expected a function with its name; got {kind(tool)}"))
            continue
        function = tool.get("function")
        if not isinstance((function if isinstance(function, dict) else tool).get("name"), str):
            problems.append(Problem(f"{place}[{index}]: the function has no `name`"))
    return value or None


def unpacked(value: object, place: str, problems: Problems) -> object:
    """What a JSON text says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        where = f" (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
        problems.append(Problem(f"{place}: not JSON{where}: {quoted(value)}"))
        return [] if value.lstrip().startswith("[") else {}


def _call(call: object, place: str, problems: Problems) -> dict[str, Any] | None:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        problems.append(Problem(f"{place}: expected a call; got {kind(call if function is None else function)}", _CALL))
        return None
    if not isinstance(function.get("name"), str) or not function["name"]:
        problems.append(Problem(f"{place}: the call has no `name`", _CALL))
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    arguments = unpacked(arguments, f"{place}.arguments", problems)
    if not isinstance(arguments, dict):
        problems.append(Problem(f"{place}.arguments: expected an object; got {kind(arguments)}"))
    read = {"name": function.get("name"), "arguments": arguments}
    around = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
    return {"type": "function", **around, "function": read}
