"""What `eval.json` says: figures with their intervals, gates, confusion tables, samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftctl.data.dataset import ONLY
from peftctl.evaluation.answers import question
from peftctl.evaluation.gate import BASE
from peftctl.evaluation.judge import Verdict
from peftctl.evaluation.measure import confusion
from peftctl.evaluation.metric import Seen
from peftctl.evaluation.metrics import METRICS
from peftctl.evaluation.sheet import Figure, Sheet
from peftctl.recipe import Recipe
from peftctl.verbs.rows import EvalSet

ADAPTER = "adapter"


def figures_record(sheets: Mapping[str, Sheet], names: Sequence[str]) -> dict[str, Any]:
    """Figures, their intervals, and how the adapter's lie to the base's, by `metric` or `set/metric`."""
    figures: dict[str, dict[str, float | None]] = {name: {} for name in names}
    intervals: dict[str, dict[str, list[float] | None]] = {name: {} for name in names}
    compared: dict[str, dict[str, Any]] = {}
    for one, sheet in sheets.items():
        for name in names:
            figures[name][keyed(one, "rows")] = len(sheet.rows)
            for metric in sheet.statistics[name]:
                figure = sheet.figure(name, metric)
                figures[name][keyed(one, metric)] = finite(figure.estimate)
                intervals[name][keyed(one, metric)] = bounds(figure)
        for metric in sheet.statistics[names[-1]] if len(names) > 1 else ():
            difference, ratio = (how(ADAPTER, BASE, metric) for how in (sheet.difference, sheet.ratio))
            compared[keyed(one, metric)] = {"difference": as_record(difference), "ratio": as_record(ratio)}
    return {"figures": figures, "intervals": intervals, **({"compared": compared} if compared else {})}


def keyed(one: str, metric: str) -> str:
    """A figure's key."""
    return f"{one}/{metric}" if one != ONLY else metric


def bounds(figure: Figure) -> list[float] | None:
    """An interval for JSON; None where it is not known."""
    low, high = figure.interval
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def as_record(figure: Figure) -> dict[str, Any]:
    """A figure for JSON."""
    return {"estimate": finite(figure.estimate), "interval": bounds(figure)}


def finite(value: float) -> float | None:
    """A number for JSON, which knows no infinity."""
    return value if math.isfinite(value) else None


def gate_record(one: Verdict) -> dict[str, Any]:
    """A verdict for JSON."""
    return {
        "gate": one.name,
        "set": one.set or None,
        "metric": one.metric,
        one.limit.kind: one.limit.value,
        "against": one.against,
        **as_record(one.measured),
        "status": one.status,
    }


def confusions_of(recipe: Recipe, seen: Mapping[str, Mapping[str, Seen]]) -> dict[str, Any]:
    """The confusion tables by eval set and model, where they are asked for."""
    if not recipe.eval.confusion:
        return {}
    labels = recipe.eval.labels
    return {
        name: {model: {"labels": labels, "counts": confusion(one)} for model, one in by_model.items()}
        for name, by_model in seen.items()
    }


def samples_of(
    recipe: Recipe, sets: Mapping[str, EvalSet], seen: Mapping[str, Mapping[str, Seen]]
) -> dict[str, list[dict[str, Any]]]:
    """The first `eval.samples` answers of every model to the rows of each eval set."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, one in sets.items() if recipe.eval.samples else ():
        rows = one.prepared.parsed
        spoken = [i for i, said in enumerate(seen[name][BASE].said) if said is not None][: recipe.eval.samples]
        found[name] = [
            {
                "place": rows[i].place,
                "question": question(rows[i]),
                "answer": seen[name][BASE].answers[i],
                **{model: by_model.said[i] for model, by_model in seen[name].items()},
            }
            for i in spoken
        ]
    return found


def without_figure(sheets: Mapping[str, Sheet], model: str) -> Iterator[str]:
    """The metrics that no row has a part in, with the reason."""
    for one, sheet in sheets.items():
        for metric in sheet.statistics[model]:
            if math.isnan(sheet.estimate(model, metric)):
                yield f"`{keyed(one, metric)}` has no figure: {METRICS[metric].absent}"
