"""The page of `peftctl data` as one HTML file: no scripts, nothing loaded, light and dark; what rows say is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from peftctl.cli.console import clean
from peftctl.cli.data_page import facts, percent, trained_share

TEMPLATE = Path(__file__).with_name("data.html.jinja")
INVISIBLE = re.compile("[\u00a0\u00ad\u200b-\u200d\u2060\ufeff]")
"""Characters that look like space or like nothing; what a terminal would obey is escaped already."""


def document(found: Mapping[str, Any]) -> str:
    """The whole file."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = code
    lengths = found["lengths"]
    bars = lengths["histogram"] if lengths else []
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        found=found,
        facts=facts(found),
        bars=bars,
        most=max((bar["rows"] for bar in bars), default=1),
        samples=[{**sample, "runs": list(runs(sample["text"]))} for sample in found["samples"]],
        share=trained_share,
        percent=percent,
    )


def runs(tokens: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Neighbours that are all trained or all masked, their tokens as they are shown."""
    run: dict[str, Any] = {}
    for token in tokens:
        if run and run["trained"] != token["trained"]:
            yield run
            run = {}
        run = run or {"trained": token["trained"], "tokens": []}
        run["tokens"].append({**token, "shown": shown(token["text"]), "breaks": token["text"].count("\n")})
    if run:
        yield run


def shown(text: str) -> str:
    """A token's text with what cannot be seen made visible: line breaks as `↵`, tabs as `⇥`."""
    text = INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", clean(text))
    return text.replace("\t", "⇥").replace("\n", "↵\n") or "∅"


def code(text: str) -> Markup:
    """A message with what stands in backticks set as code."""
    parts = [escape(clean(part)) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))
