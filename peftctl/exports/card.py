"""The model card: what an adapter or a merged model is, made of, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells."""

    base: str
    """Hub id or path of the base model; of a path only the last part is told."""
    method: str
    """What `method` says, in one line."""
    recipe: str
    """The resolved recipe, as YAML."""
    counts: Mapping[str, Mapping[str, int]]
    """Rows read, kept, truncated, dropped and skipped, for training and evaluation."""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What was measured, for base and adapter."""
    merged: bool = False
    """Whether the card is for a merged model instead of an adapter."""


def public(name: str) -> str:
    """A model's name as others may see it: a hub id as it is, a path without the folders it lies in."""
    return PurePath(name).name if name.startswith(("/", ".", "~")) or "\\" in name else name


def fenced(text: str, language: str = "") -> str:
    """A block of code that `text` cannot leave."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def card(facts: Facts) -> str:
    """README.md of an adapter folder or a merged model."""
    base = public(facts.base)
    hub = f"base_model: {base}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    kind = "merged model" if facts.merged else "adapter"
    library = "transformers" if facts.merged else "peft"
    parts = [
        f"---\n{hub}library_name: {library}\ntags:\n- peftctl\n---",
        f"# {kind.capitalize()} of `{base}`",
        f"Trained with peftctl: {facts.method}.",
        "## Use",
        fenced(merged_use() if facts.merged else adapter_use(base), "python"),
        "## Data",
        table(["rows", "read", "kept", "truncated", "dropped", "skipped"], facts.counts),
    ]
    if facts.figures:
        metrics = list(next(iter(facts.figures.values())))
        parts += ["## Evaluation", table(["model", *metrics], facts.figures)]
    parts += ["## Recipe", fenced(without_folders(facts.recipe), "yaml")]
    return "\n\n".join(parts) + "\n"


def table(columns: list[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table, a row for each entry of `rows`."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, values in rows.items():
        cells = [
            f"{values.get(c, ''):.4g}" if isinstance(values.get(c), float) else str(values.get(c, ""))
            for c in columns[1:]
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def without_folders(recipe: str) -> str:
    """The recipe's text with absolute paths cut to their last part: a card names no folders of somebody's machine."""
    return re.sub(r"(?<=[\s'\"])(?:/[^\s'\"]+)+/([^\s/'\"]+)", r"\1", recipe)


def adapter_use(base: str) -> str:
    return f'''from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")'''


def merged_use() -> str:
    return """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")"""
