"""`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`, OpenAI's form."""

from __future__ import annotations

from peftctl.data.file import Row
from peftctl.data.formats.conversation import answered, messages
from peftctl.data.formats.form import Form, Problems
from peftctl.data.formats.kinds import Chat
from peftctl.data.formats.tool_calls import tools


def read(row: Row, problems: Problems) -> Chat:
    place = f"{row.place}: messages"
    said, flags = messages(row.value["messages"], place, problems)
    offered = tools(row.value.get("tools"), f"{row.place}: tools", problems)
    if not problems:
        problems += answered(said, place)
    return Chat(row.place, said, tools=offered, flags=flags)


MESSAGES = Form(name="messages", required=("messages",), optional=("tools",), read=read)
