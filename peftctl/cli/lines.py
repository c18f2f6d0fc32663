"""The one line that lives: a step of training, or how far something long has come, fitted to the width."""

from __future__ import annotations

from typing import Any

from rich.console import ConsoleOptions
from rich.text import Text

from peftctl.cli.console import one_line
from peftctl.cli.pace import Pace, duration, figures, quantity, rate

GAP = 2
BAR = 16
"""Columns of a bar."""
WIDE = 96
"""Columns from which a bar goes beside all that a step has to say."""


def step_line(pace: Pace, options: ConsoleOptions | None = None) -> Text:
    """The last step. On a terminal of `options` the least important parts go until the rest fits; else all stay."""
    last = pace.last
    total = str(last["steps"])
    loss = Text.assemble(("loss ", "dim"), f"{pace.loss:.4f}")
    parts = {"step": Text.assemble(("step ", "dim"), (f"{last['step']:>{len(total)}}", "bold"), f"/{total}")}
    if options is None:
        parts["epoch"] = _said("epoch", f"{last['epoch']:.2f}")
    else:
        arrows = "v-^" if options.ascii_only else "↓→↑"
        loss.append(f" {arrows[pace.trend + 1]}", ("green", "dim", "red")[pace.trend + 1])
    parts["loss"] = loss
    parts |= {word: _said(word, value) for word, value in figures(pace.watched).items()}
    parts["rate"] = _said("lr", rate(last["learning_rate"]))
    if pace.tokens_per_second is not None:
        parts["speed"] = Text.assemble(quantity(pace.tokens_per_second), (" tok/s", "dim"))
    if last.get("memory"):
        parts["memory"] = Text.assemble(f"{last['memory'] / 2**30:.2f}", (" GiB", "dim"))
    if not pace.finished:
        parts["left"] = Text.assemble(duration(pace.seconds_left), (" left", "dim"))
    if options is None:
        return _joined(list(parts.values()))
    for name in ("kl", "rate", "memory", "margin", "speed", "accuracy", "left", "loss"):
        if _width(parts) > options.max_width:
            parts.pop(name, None)
    line = _joined(list(parts.values()))
    if options.max_width >= WIDE:
        line = _joined([_bar(last["step"] / last["steps"], BAR, options), line])
    line.truncate(options.max_width)
    return line


def bar_line(event: dict[str, Any], seconds: float, options: ConsoleOptions) -> Text:
    """How far something has come that began `seconds` ago."""
    done, total = event["done"], max(event["total"], 1)
    figures = Text(f"{done:>{len(f'{total:,}')},}/{total:,}")
    if done and seconds > 2:
        figures.append(f"  {duration(seconds / done * (total - done))}").append(" left", "dim")
    what = Text(one_line(event["what"]))
    room = options.max_width - figures.cell_len - GAP
    parts = [what, figures]
    if what.cell_len + GAP + BAR <= room:
        parts.insert(1, _bar(done / total, BAR, options))
    else:
        what.truncate(max(room, 0), overflow="ellipsis")
    line = _joined(parts)
    line.truncate(options.max_width)
    return line


def _said(label: str, value: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), value)


def _joined(parts: list[Text]) -> Text:
    return Text(" " * GAP, no_wrap=True, end="").join(parts)


def _width(parts: dict[str, Text]) -> int:
    return sum(part.cell_len for part in parts.values()) + GAP * (len(parts) - 1)


def _bar(share: float, columns: int, options: ConsoleOptions) -> Text:
    full, empty = ("#", "-") if options.ascii_only else ("━", "─")
    filled = int(min(share, 1.0) * columns)
    return Text.assemble((full * filled, "cyan"), (empty * (columns - filled), "dim"))
