"""A whole model to give away: merged, proved, with a model card; plain transformers loads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftctl.exports.card import Facts, card, public
from peftctl.exports.merge import merge


def export_safetensors(base: Path, adapter: Path, output: Path, *, facts: Facts, **options: Any) -> dict[str, Any]:
    """Merge `adapter` into the model in `base`, with a model card of `facts` beside it.

    `options` are those of `merge`, as are what is returned and what is raised.
    """
    beside = {"README.md": card(replace(facts, merged=True))}
    return merge(base, adapter, output, **{"base_name": public(facts.base), "beside": beside, **options})
