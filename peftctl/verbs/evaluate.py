"""`peftctl eval`: the figures of the base and of the adapter side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftctl.engine.disk import fitting
from peftctl.engine.tensor_file import WEIGHTS
from peftctl.errors import RunError
from peftctl.evaluation.measure import measure, summary
from peftctl.methods import load
from peftctl.models import base as models
from peftctl.models.allocator import keep_memory
from peftctl.recipe import Recipe
from peftctl.training import filesystem, storage
from peftctl.verbs import provenance
from peftctl.verbs.events import Listen, silent, speaker, ticker
from peftctl.verbs.rows import evaluation_rows
from peftctl.verbs.target import open_target


def evaluate(
    target: str,
    *,
    overrides: Iterable[str] = (),
    adapter: str | None = None,
    listen: Listen = silent,
) -> dict[str, Any]:
    """Measure the base, and the adapter when there is one, on the recipe's evaluation rows.

    Writes `eval.json` into the run folder and returns what stands in it. Raises PeftctlError.
    """
    keep_memory()
    found = open_target(target, overrides, adapter)
    if found.recipe is None:
        raise RunError(f"{target}: an adapter alone does not say what to measure", "use its run folder or its recipe")
    found.check_base()
    say = speaker(listen)
    base = models.load(found.model, say=say)
    rows, encoder = evaluation_rows(found.recipe, base.tokenizer, say)
    settings, pad = found.recipe.eval, base.tokenizer.pad_token_id
    figures: dict[str, dict[str, float]] = {}
    if found.adapter is not None:
        fitting(base.model, found.adapter)  # what does not fit is told before the base takes its time
    tick = ticker(listen, "evaluating the base")
    figures["base"] = measure(base.model, rows.parsed, encoder, settings, pad, tick)
    if found.adapter is not None:
        load(base.model, found.adapter)  # only now: full fine-tuning is written into the base itself
        tick = ticker(listen, "evaluating the adapter")
        figures["adapter"] = measure(base.model, rows.parsed, encoder, settings, pad, tick)
    record = {
        "model": base.name,
        "adapter": str(found.adapter) if found.adapter else None,
        "adapter_sha256": provenance.file_digest(found.adapter / WEIGHTS) if found.adapter else None,
        "data": rows.digest,
        "evaluated": provenance.now(),
        "figures": figures,
    }
    tell(figures, listen)
    path = where(found.recipe, found.folder.path if found.folder else None)
    filesystem.make_folder(path.parent)
    storage.replace_atomically(path, provenance.json_bytes(record))
    return {"path": str(path), **record}


def where(recipe: Recipe, run: Path | None) -> Path:
    """The file that the figures go to: in the run folder; beside where it would be when there is no run yet."""
    return run / "eval.json" if run else Path(f"{recipe.output}.base-eval.json")


def tell(figures: dict[str, dict[str, float]], listen: Listen) -> None:
    """The figures as a table, one column for each model."""
    columns = {name: summary(values) for name, values in figures.items()}
    metrics = list(next(iter(columns.values())))
    rows = [[metric, *(column[metric] for column in columns.values())] for metric in metrics]
    listen({"event": "table", "title": "evaluation", "columns": ["metric", *columns], "rows": rows})
