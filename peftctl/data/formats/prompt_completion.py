"""`{"prompt": "...", "completion": "..."}`, both texts or both lists of messages."""

from __future__ import annotations

from peftctl.data.file import Row
from peftctl.data.formats.conversation import answered, messages
from peftctl.data.formats.form import Form, Problems, kind
from peftctl.data.formats.kinds import Chat, Pair
from peftctl.data.formats.tool_calls import tools
from peftctl.errors import Problem


def read(row: Row, problems: Problems) -> Chat | Pair:
    prompt, completion = row.value["prompt"], row.value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = messages(prompt, f"{row.place}: prompt", problems)
        after, flags = messages(completion, f"{row.place}: completion", problems)
        offered = tools(row.value.get("tools"), f"{row.place}: tools", problems)
        if not problems:
            problems += answered(after, f"{row.place}: completion")
        flags = flags and (True,) * len(before) + flags
        return Chat(row.place, before + after, first=len(before), tools=offered, flags=flags)
    for key, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            text = f"{row.place}: {key}: expected a text; got {kind(value)}"
            problems.append(Problem(text, "`prompt` and `completion` are both texts or both lists of messages"))
    if completion == "":
        problems.append(Problem(f"{row.place}: completion: is empty"))
    return Pair(row.place, prompt, completion)


PROMPT_COMPLETION = Form(name="prompt_completion", required=("prompt", "completion"), optional=("tools",), read=read)
