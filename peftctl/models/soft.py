"""From logits to log-probabilities, and to what the gradient needs of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Soften(Protocol):
    """Turns logits [n, vocabulary], in any dtype, into the log-probabilities [n] of `labels` in float32.

    With `residual`, the logits become onehot(labels) - softmax(logits), times the slope of the cap, in place.
    """

    def __call__(self, logits: Tensor, labels: Tensor, cap: float | None, residual: bool) -> Tensor: ...


def soften(logits: Tensor, labels: Tensor, cap: float | None, residual: bool) -> Tensor:
    """In torch's own operations."""
    exact = logits.float()
    slope = None
    if cap is not None:
        bent = torch.tanh(exact / cap)
        exact, slope = cap * bent, 1 - bent.square()
    logs = exact.log_softmax(dim=-1)
    chosen = logs.gather(1, labels[:, None])
    if residual:
        rest = logs.exp_().neg_().scatter_add_(1, labels[:, None], torch.ones_like(chosen))
        logits.copy_(rest if slope is None else rest.mul_(slope))
    return chosen.flatten()
