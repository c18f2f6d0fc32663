"""How much there is to compute: rows, tokens, steps, and the micro-batch that takes most memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from peftctl.data.batches import Layout, Part, order
from peftctl.data.encode import Encoded
from peftctl.data.prepare import Prepared
from peftctl.planning.step import MicroBatch
from peftctl.tasks.task import Task
from peftctl.training.trainer import Trainer, total_steps

LOOK = 64
"""Steps of the first epoch that are looked at."""


@dataclass(frozen=True)
class Workload:
    """What a run goes through."""

    task: Task
    """The recipe's, with what it takes from the rows."""
    batch: MicroBatch
    """The widest of its micro-batches."""
    positions: float
    """What a step computes, padding included."""
    steps: int | None
    """None where nobody knows how many rows there are."""
    rows: int | None
    tokens: int | None
    """Of all rows."""
    note: str | None
    """Where the figures are from when that is not the rows themselves."""


def of_rows(trainer: Trainer, task: Task, prepared: Prepared, seed: int, pad: int = 0) -> Workload:
    """The workload of rows that are read; `pad` is what they are padded with, which changes nothing."""
    rows = prepared.rows
    packed = trainer.packing != "off" and task.packable
    layout = Layout(rows, trainer.micro_batch_size, pad, "lines" if packed else None, task.collate)
    steps = order(prepared.parts, trainer.batch_size, seed, epoch=0)
    shapes = [[layout.shape(part) for part in layout.micro_batches(step)] for step in steps[:LOOK]]
    longest = rows.lengths.argsort()[::-1]  # the longest rows, side by side
    lines = min(trainer.micro_batch_size, max(lines for step in shapes for lines, _ in step))
    return Workload(
        task,
        MicroBatch.of(task.collate([rows[int(longest[line % len(rows)])] for line in range(lines)], pad)),
        fmean(sum(lines * width for lines, width in step) for step in shapes),
        total_steps(trainer, prepared.parts),
        len(rows),
        prepared.ledger.tokens,
        None,
    )


def of_length(
    trainer: Trainer, task: Task, row: Encoded, rows: int | None, tokens: int | None, note: str, pad: int = 0
) -> Workload:
    """The workload of rows that nobody has read: every one of them like `row`."""
    lines = min(trainer.micro_batch_size, trainer.batch_size)
    # no two begin alike: what rows have in common is computed once
    alike = [replace(row, ids=array("i", [line, *row.ids[1:]])) for line in range(lines)]
    batch = MicroBatch.of(task.collate(alike, pad))
    positions = batch.tokens / lines * trainer.batch_size
    known = trainer.steps is not None or rows is not None
    steps = total_steps(trainer, [Part(rows or 0)]) if known else None
    return Workload(task, batch, positions, steps, rows, tokens, note)


def record(load: Workload) -> dict[str, Any]:
    """The same as data."""
    return {
        "rows": load.rows,
        "tokens": load.tokens,
        "steps": load.steps,
        "positions_per_step": round(load.positions),
        "micro_batch": {name: list(each.shape) for name, each in load.batch.tensors.items()},
        "note": load.note,
    }
