"""What is in an adapter folder: facts of every method; of a LoRA, how large and how wide each of its updates is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from peftctl.algebra.lora_folder import Update, read_lora_folder
from peftctl.algebra.settings import changed
from peftctl.config.write import dump
from peftctl.engine.disk import method_in
from peftctl.engine.method import Method, name_of
from peftctl.engine.peft_config import PEFT_TYPES, read_config
from peftctl.engine.tensor_file import ECHO, WEIGHTS, header, is_copy
from peftctl.methods.lora import LoRA

TOPS = (1, 2, 4, 8, 16, 32)
"""Ranks whose share of the energy is told, up to that of the update."""


def inspected(folder: Path) -> dict[str, Any]:
    """The facts of the adapter in `folder`. Raises AdapterError for a damaged one."""
    method, config = method_in(folder), read_config(folder)
    stored = {key: entry for key, entry in header(folder / WEIGHTS).items() if not ECHO.fullmatch(key)}
    saved = getattr(method, "modules_to_save", [])
    by_peft = method.peft_type in PEFT_TYPES  # it alone writes copies of the base beside
    own = {key: entry for key, entry in stored.items() if not (by_peft and is_copy(key, saved))}
    found: dict[str, Any] = {
        "path": str(folder),
        "method": name_of(method),
        "peft_type": method.peft_type,
        "base": config.get("base_model_name_or_path"),
        "parameters": sum(math.prod(shape) for _, shape in own.values()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "dtype": sorted({kind for kind, _ in stored.values()}),
        "sites": sites_of(method),
        "settings": dump(changed(method)),
    }
    if type(method) is LoRA:
        updates = read_lora_folder(folder).updates
        ranks = [update.rank for update in updates.values()]
        figures = [{"site": site, **measured(update)} for site, update in sorted(updates.items())]
        found["rank"] = {"min": min(ranks), "mean": sum(ranks) / len(ranks), "max": max(ranks)}
        found["norm"] = math.sqrt(sum(figure["norm"] ** 2 for figure in figures))
        found["updates"] = figures
    return found


def sites_of(method: Method) -> dict[str, Any]:
    """How many modules are adapted, and how many of each last name; none of a method that adapts the model itself."""
    targets = getattr(method, "target_modules", [])
    names = targets if isinstance(targets, list) else []
    return {"count": len(names), "by_name": dict(sorted(Counter(n.rpartition(".")[2] for n in names).items()))}


def measured(update: Update) -> dict[str, Any]:
    """Rank, scale, norm ||s B A||, effective rank, and which share of the energy the first ranks hold."""
    singular = update.factors().singular()
    squares = singular.square()
    shares = (squares / squares.sum()).cumsum(0) if squares.sum() else squares
    tops = [top for top in TOPS if top < update.rank]
    return {
        "rank": update.rank,
        "scale": update.scale,
        "norm": math.sqrt(float(squares.sum())),
        "effective_rank": effective_rank(singular),
        "energy_of_first": {str(top): float(shares[min(top, len(shares)) - 1]) for top in tops},
    }


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007); 0 of a zero matrix."""
    positive = singular[singular > 0]
    if not len(positive):
        return 0.0
    shares = positive / positive.sum()
    return math.exp(-float((shares * shares.log()).sum()))
