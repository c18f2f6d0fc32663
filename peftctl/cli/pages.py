"""Pages that a person asks for: lists of names, and all about one method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftctl.cli.layout import aligned
from peftctl.cli.pace import rate

INDENT = "    "


def listing(rows: Sequence[tuple[str, str]], columns: int | None) -> str:
    """Names, and beside each what it is."""
    return "\n".join(f"{name}{text}".rstrip() for name, text in aligned(rows, columns))


def method_page(method: Mapping[str, Any], columns: int | None) -> str:
    """A method: what its file opens with, what is particular to it, and its fields as a recipe would set them."""
    facts = [("learning rate", f"{rate(method['learning_rate'])}, where the recipe gives none")]
    facts.append(("in HF PEFT", str(method.get("peft") or "not there: its folders are for peftctl alone")))
    if method.get("merges"):
        facts.append(("merges", str(method["merges"])))
    facts += [("not with", f"`{key}`: {why}") for key, why in method.get("clashes", {}).items()]
    return _page(method, facts, columns)


def task_page(task: Mapping[str, Any], columns: int | None) -> str:
    """A task: what its file opens with, which models it trains and what is measured, and its fields."""
    facts = [("trains", f"a {task['model']}"), ("measured by", ", ".join(task["metrics"]))]
    return _page(task, facts, columns)


def _page(found: Mapping[str, Any], facts: Sequence[tuple[str, str]], columns: int | None) -> str:
    fields = ["fields:", *(_field(field, columns) for field in found["fields"])] if found["fields"] else []
    return "\n\n".join([found["name"], found["page"], listing(facts, columns), *fields])


def _field(field: Mapping[str, Any], columns: int | None) -> str:
    """`r: 16  (whole number of at least 1)`, and below it what it does."""
    default = field["default"]
    written = default if isinstance(default, str) and default else json.dumps(default, ensure_ascii=False)
    note = f"{field['type']}, required" if field.get("required") else field["type"]
    head = f"  {field['name']}:{'' if field.get('required') else ' ' + written}  ({note})"
    return "\n".join([head, *(INDENT + line for _, line in aligned([("", field["doc"])], columns and columns - 4))])
