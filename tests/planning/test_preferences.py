"""Tasks that compare answers are planned, with what they compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_preferences

from peftctl import recipe as recipes
from peftctl.verbs.plan import plan


@pytest.mark.parametrize("form", ["texts", "chats"])
@pytest.mark.parametrize("task", ["dpo", "orpo", "simpo", "kto"])
def test_every_task_that_compares_answers(task: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = getattr(tiny_preferences, form)(12)
    rows = tiny_preferences.feedback(rows) if task == "kto" else rows
    base = tiny_chat.write_base(tmp_path / "base")
    lines = tiny_chat.write_rows(tmp_path / "rows.jsonl", rows)
    written = tiny_chat.recipe(base, lines, trainer={"task": task, "micro_batch_size": 4})
    found = plan(recipes.coerce(written))
    assert found["memory"]["activations"] > 0
    assert found["flops"]["per_token"] > 0
