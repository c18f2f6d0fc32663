"""The loss of a task, and what else it tells, over rows, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.data.encode import Encoded
from peftctl.engine.inputs import evaluating
from peftctl.tasks import Task
from peftctl.tasks.task import Batch


@torch.no_grad()
def means(
    model: nn.Module,
    task: Task,
    rows: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
    accelerator: Any,
    poll: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The mean `loss` of `rows` as `task` weighs them, over all processes, and its other figures.

    The model's mode stays as it was. Rows go in order of length, so that little is padded. `poll` is called before
    every batch and may raise.
    """
    ordered = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    own = batches[accelerator.process_index :: accelerator.num_processes] or [[]]
    weight = sum(map(task.weight, rows))

    def made(chosen: Sequence[int]) -> Batch:
        batch = task.collate([rows[i] for i in chosen], pad_id)
        return {key: value.to(accelerator.device) for key, value in batch.items()}

    known = looked_ahead(model, task, map(made, own), weight, accelerator)
    totals: dict[str, Tensor] = {}
    with evaluating(model):
        for chosen in own:
            poll()
            add(totals, {key: value.double().cpu() for key, value in task.sums(model, made(chosen) | known).items()})
    return reduced(totals, weight, accelerator)


@torch.no_grad()
def looked_ahead(
    model: nn.Module, task: Task, batches: Iterable[Batch], weight: float, accelerator: Any
) -> dict[str, Tensor]:
    """What the losses of `batches`, this process's part of rows that weigh `weight`, take from all of these rows."""
    if not task.looks_ahead:
        return {}
    totals: dict[str, Tensor] = {}
    with evaluating(model):
        for batch in batches:
            add(totals, task.ahead(model, batch))
    found = reduced(totals, weight, accelerator)
    return {name: torch.tensor(value, device=accelerator.device) for name, value in found.items()}


def add(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add the figures of a batch to those of the batches before it."""
    for key, value in sums.items():
        totals[key] = totals[key] + value.detach() if key in totals else value.detach()


def reduced(totals: Mapping[str, Tensor], weight: float, accelerator: Any) -> dict[str, float]:
    """The sums of all processes, which have the same keys, divided by `weight`."""
    summed = torch.stack([total.float() for total in totals.values()]).to(accelerator.device)
    found: list[float] = (accelerator.reduce(summed, "sum") / weight).tolist()
    return dict(zip(totals, found, strict=True))
