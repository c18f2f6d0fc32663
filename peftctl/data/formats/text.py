"""`{"text": "..."}`."""

from __future__ import annotations

from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Problems, text_at
from peftctl.data.formats.kinds import Text


def read(row: Row, problems: Problems) -> Text:
    return Text(row.place, text_at(row, "text", problems))


TEXT = Form(name="text", required=("text",), read=read)
