"""How well a model finds the noise in each of some pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from peftctl.data.encode import Encoded
from peftctl.engine.inputs import evaluating
from peftctl.errors import DataError
from peftctl.evaluation.metric import Array
from peftctl.evaluation.scoring import Tick
from peftctl.tasks import Task


@torch.no_grad()
def errors(model: nn.Module, task: Task, rows: Sequence[Encoded], pad_id: int, tick: Tick) -> Array:
    """The loss of each row [n], at the noise and the timesteps that it is always measured at.

    Raises DataError when there are no rows.
    """
    if not rows:
        raise DataError("dataset.eval: no row is left to evaluate", "look at `on_long`")
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for number in range(len(rows)):
            batch = task.collate([rows[number]], pad_id)
            found.append(float(task.loss(model, {name: value.to(device) for name, value in batch.items()})))
            tick(number + 1, len(rows))
    return np.array(found)
