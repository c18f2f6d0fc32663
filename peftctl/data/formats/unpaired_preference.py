"""`{"prompt": "...", "completion": "...", "label": true}`: an answer, and whether it is a good one (KTO's form)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Problems, kind
from peftctl.data.formats.kinds import Feedback, Pair
from peftctl.data.formats.prompt_completion import read as read_pair
from peftctl.errors import Problem

_WORDS = {"true": True, "false": False}


def read(row: Row, problems: Problems) -> Feedback:
    desirable = _truth(row.value["label"])
    if desirable is None:
        what = f"expected true or false; got {kind(row.value['label'])}"
        problems.append(Problem(f"{row.place}: label: {what}"))
    pair = read_pair(row, problems)
    if isinstance(pair, Pair):
        return Feedback(row.place, pair.prompt, pair.completion, bool(desirable))
    before, after = pair.messages[: pair.first], pair.messages[pair.first :]
    return Feedback(row.place, before, after, bool(desirable), pair.tools)


def _truth(label: object) -> bool | None:
    """True or false, which a CSV file can only spell; None where it is something else."""
    return label if isinstance(label, bool) else _WORDS.get(label.lower()) if isinstance(label, str) else None


def _fits(value: Mapping[str, Any]) -> bool:
    return _truth(value["label"]) is not None


UNPAIRED_PREFERENCE = Form(
    name="unpaired_preference",
    required=("prompt", "completion", "label"),
    optional=("tools",),
    read=read,
    fits=_fits,
)
