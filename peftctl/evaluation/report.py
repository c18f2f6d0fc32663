"""An evaluation in tables: for a terminal as rows of text, for the summary of a CI job as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peftctl.evaluation.judge import Verdict, spelled
from peftctl.evaluation.junit import clean
from peftctl.evaluation.metrics import METRICS
from peftctl.evaluation.sheet import Figure, Sheet

SHOWN = 200
"""Characters of a text in a table of samples."""


class Table(NamedTuple):
    """A table of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(
    sheets: Mapping[str, Sheet],
    verdicts: Sequence[Verdict],
    confusions: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    models: Sequence[str],
) -> list[Table]:
    """Everything that an evaluation shows: figures and, where asked for, confusion tables, samples and gates."""
    found = [figure_table(name, sheet, models) for name, sheet in sheets.items()]
    for name, by_model in confusions.items():
        for model, table in by_model.items():
            labels = table["labels"]
            rows = [[label, *map(str, row)] for label, row in zip(labels, table["counts"], strict=True)]
            found.append(Table(titled(f"{model}: answers (rows) taken for (columns)", name), ["", *labels], rows))
    for name, said in samples.items():
        rows = [[short(one[key]) for key in ("question", "answer", *models)] for one in said]
        found.append(Table(titled("samples", name), ["question", "answer", *models], rows))
    if verdicts:
        rows = [[one.name, spelled(one.measured, METRICS[one.metric]), one.status] for one in verdicts]
        found.append(Table("gates", ["gate", "measured", "result"], rows))
    return found


def figure_table(name: str, sheet: Sheet, models: Sequence[str]) -> Table:
    """One row for each metric, a column for each model, and how far the last lies from the first."""
    first, last = models[0], models[-1]
    columns = ["metric", *models, *([f"{last} - {first}"] if len(models) > 1 else [])]
    rows = [["rows", *([f"{len(sheet.rows):,}"] * len(models)), *([""] if len(models) > 1 else [])]]
    for metric in sheet.statistics[first]:
        cells = [in_words(metric, sheet.figure(model, metric)) for model in models]
        if len(models) > 1:
            cells.append(in_words(metric, sheet.difference(last, first, metric), signed=True))
        rows.append([metric, *cells])
    return Table(titled("evaluation", name), columns, rows)


def in_words(metric: str, figure: Figure, signed: bool = False) -> str:
    """`92.7% [90.1, 94.8]`, with the 95 % interval; shares in per cent; `none` where there is no figure."""
    if math.isnan(figure.estimate):
        return "none"
    percent = METRICS[metric].percent
    scale, plus = 100 if percent else 1, "+" if signed else ""
    form = f"{plus}.1f" if percent else f"{plus}.4g"
    unit = "%" if percent else ""
    estimate = f"{figure.estimate * scale:{form}}{unit}"
    low, high = figure.interval
    if low == float("-inf"):
        return estimate
    return f"{estimate} [{low * scale:{form}}, {high * scale:{form}}]"


def markdown(found: Sequence[Table]) -> str:
    """Tables as GitHub and GitLab show them; what stands in them is never markup."""
    parts = ["# Evaluation"]
    for title, columns, rows in found:
        lines = [columns, ["---"] * len(columns), *rows]
        body = [f"| {' | '.join(escaped(cell) if i != 1 else cell for cell in row)} |" for i, row in enumerate(lines)]
        parts.append("\n".join([f"## {escaped(title)}", "", *body]))
    parts.append("In brackets: 95 % intervals over 2,000 draws of the rows, the same draws for every model.")
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` on one line, with every character that Markdown or HTML could take for its own shown as it is."""
    text = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", clean(" ".join(text.split())))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(value: Any) -> str:
    """A text, or a conversation, in a cell."""
    if isinstance(value, list):
        value = " / ".join(f"{message.get('role')}: {message.get('content')}" for message in value)
    text = "" if value is None else str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def titled(what: str, name: str) -> str:
    """A title with the eval set, where it has a name."""
    return f"{what}: {name}" if name else what
