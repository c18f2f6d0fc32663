"""`{"source": "...", "target": "..."}`: a text and its translation, or its summary."""

from __future__ import annotations

from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Problems, text_at
from peftctl.data.formats.kinds import Translated


def read(row: Row, problems: Problems) -> Translated:
    return Translated(row.place, text_at(row, "source", problems), text_at(row, "target", problems))


def texts(value: object) -> bool:
    return isinstance(value, str)


SOURCE_TARGET = Form(
    name="source_target",
    required=("source", "target"),
    read=read,
    fits=lambda value: texts(value["source"]) and texts(value["target"]),
)
