"""`{"prompt": "...", "chosen": "...", "rejected": "..."}`: a better and a worse answer, as texts or as messages.

Without `prompt`, `chosen` and `rejected` are whole conversations, and the prompt is what both begin with.
"""

from __future__ import annotations

from peftctl.data.file import Row
from peftctl.data.formats.conversation import answered, messages
from peftctl.data.formats.form import Form, Problems, kind
from peftctl.data.formats.kinds import Message, Preference, Said
from peftctl.data.formats.tool_calls import tools
from peftctl.errors import Problem


def read(row: Row, problems: Problems) -> Preference:
    prompt, chosen, rejected = (row.value.get(key) for key in ("prompt", "chosen", "rejected"))
    offered = tools(row.value.get("tools"), f"{row.place}: tools", problems)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _conversations(row, problems)
    else:
        _texts(row, problems)
    if chosen == rejected and not problems:
        problems.append(Problem(f"{row.place}: `chosen` and `rejected` are the same"))
    return Preference(row.place, prompt, chosen, rejected, offered)  # type: ignore[arg-type]


def _texts(row: Row, problems: Problems) -> None:
    if row.value.get("prompt") is None:
        hint = "without it, `chosen` and `rejected` are whole conversations: lists of messages"
        problems.append(Problem(f"{row.place}: `prompt` is missing", hint))
    for key in ("prompt", "chosen", "rejected"):
        value = row.value.get(key)
        if value is not None and not isinstance(value, str):
            hint = "`prompt`, `chosen` and `rejected` are all texts or all lists of messages"
            problems.append(Problem(f"{row.place}: {key}: expected a text; got {kind(value)}", hint))
        elif key != "prompt" and value == "":
            problems.append(Problem(f"{row.place}: {key}: is empty"))


def _conversations(row: Row, problems: Problems) -> tuple[Said, Said, Said]:
    prompt = row.value.get("prompt")
    asked: list[Message] = []
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        asked, _ = messages(prompt, f"{row.place}: prompt", problems)
    chosen, _ = messages(row.value["chosen"], f"{row.place}: chosen", problems)
    rejected, _ = messages(row.value["rejected"], f"{row.place}: rejected", problems)
    if problems:
        return asked, chosen, rejected
    for key, said in (("chosen", chosen), ("rejected", rejected)):
        problems += answered(said, f"{row.place}: {key}")
    if asked and "assistant" == chosen[0]["role"] == rejected[0]["role"]:
        return asked, chosen, rejected
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if not same:
        what = "begin with different messages, so they answer no common prompt"
        problems.append(Problem(f"{row.place}: `chosen` and `rejected` {what}"))
    elif asked and chosen[:same][-len(asked) :] != asked and chosen[: len(asked)] != asked:
        problems.append(Problem(f"{row.place}: prompt: is not what `chosen` and `rejected` begin with"))
    return chosen[:same], chosen[same:], rejected[same:]


PREFERENCE = Form(name="preference", required=("chosen", "rejected"), optional=("prompt", "tools"), read=read)
