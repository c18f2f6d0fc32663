"""`{"text": "...", "label": "positive"}`, or two texts with `text_pair`; the label is a text or a whole number."""

from __future__ import annotations

from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Problems, kind, text_at
from peftctl.data.formats.kinds import Labelled
from peftctl.errors import Problem


def read(row: Row, problems: Problems) -> Labelled:
    text, label = text_at(row, "text", problems), row.value["label"]
    pair = None if row.value.get("text_pair") is None else text_at(row, "text_pair", problems)
    if isinstance(label, bool) or not isinstance(label, str | int):
        problems.append(Problem(f"{row.place}: label: expected a text or a whole number; got {kind(label)}"))
    elif isinstance(label, str) and not label.strip():
        problems.append(Problem(f"{row.place}: label: is empty"))
    return Labelled(row.place, text, label.strip() if isinstance(label, str) else label, pair)


TEXT_LABEL = Form(name="text_label", required=("text", "label"), optional=("text_pair",), read=read)
