"""The loss of a task, and what else it tells, over rows, in constant memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.data.encode import Encoded
from peftctl.engine.inputs import evaluating
from peftctl.tasks import Task


@torch.no_grad()
def means(
    model: nn.Module, task: Task, rows: Sequence[Encoded], batch_size: int, pad_id: int, accelerator: Any
) -> dict[str, float]:
    """The mean `loss` of `rows` as `task` weighs them, over all processes, and its other figures.

    The model's mode stays as it was. Rows go in order of length, so that little is padded.
    """
    ordered = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    totals: dict[str, Tensor] = {}
    with evaluating(model):
        for chosen in batches[accelerator.process_index :: accelerator.num_processes] or [[]]:
            batch = task.collate([rows[i] for i in chosen], pad_id)
            sums = task.sums(model, {key: value.to(accelerator.device) for key, value in batch.items()})
            add(totals, {key: value.double().cpu() for key, value in sums.items()})
    return reduced(totals, sum(map(task.weight, rows)), accelerator)


def add(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add the figures of a batch to those of the batches before it."""
    for key, value in sums.items():
        totals[key] = totals[key] + value.detach() if key in totals else value.detach()


def reduced(totals: Mapping[str, Tensor], weight: float, accelerator: Any) -> dict[str, float]:
    """The sums of all processes, which have the same keys, divided by `weight`."""
    summed = torch.stack([total.float() for total in totals.values()]).to(accelerator.device)
    found: list[float] = (accelerator.reduce(summed, "sum") / weight).tolist()
    return dict(zip(totals, found, strict=True))
