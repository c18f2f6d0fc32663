"""How far a run is, and whether it has changed anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from peftctl.errors import StorageError
from peftctl.training.checkpoint import Checkpoint

PIECE = 1 << 20
"""Elements that are summed at once: a whole matrix in double precision would be the most that a run holds."""


class Progress(NamedTuple):
    """What the loop carries from step to step beside weights and optimizer; a checkpoint stores it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int = 0
    """The step of the newest evaluation."""
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    def judged(self, loss: float) -> Progress:
        """After an evaluation of this step: a new best one, or one more without."""
        now = self._replace(evaluated=self.step)
        if self.best_loss is None or loss < self.best_loss:
            return now._replace(best_loss=loss, best_step=self.step, evaluations_since_best=0)
        return now._replace(evaluations_since_best=self.evaluations_since_best + 1)


def resumed(found: Checkpoint) -> Progress:
    """Where the run of a checkpoint was. Raises StorageError when it does not say."""
    try:
        progress = Progress(**found.state["progress"])
    except (KeyError, TypeError):
        progress = Progress(step=-1)
    if progress.step != found.step:
        text = f"{found.path}: `state.json` does not say how far the run was"
        raise StorageError(text, "train anew with `--output`")
    return progress


def marks(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The sum of each tensor: equal ones, later, say that nothing was learned."""
    return {name: math.fsum(map(total, torch.split(each.detach().flatten(), PIECE))) for name, each in tensors.items()}


def total(piece: Tensor) -> float:
    """In double precision, where a step of bfloat16 shows."""
    return float(piece.to("cpu", torch.float64).sum())
