"""Simple preference optimisation. Meng et al. 2024, arXiv:2405.14734.

    loss = - log sigmoid(beta (log p'_w - log p'_l) - gamma)      (eq. 6)

log p' the log-probability of an answer per token; beta log p' is its reward. No reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import NonNegative, Positive
from peftctl.tasks.preference import Preferring, watched
from peftctl.tasks.scores import Scores, scores
from peftctl.tasks.task import register


@register
@dataclass(frozen=True, kw_only=True)
class SimPO(Preferring):
    """Prefer the better of two answers by a margin, per token and without a reference."""

    beta: Positive = 2.0
    """Scale of the difference."""
    gamma: NonNegative = 1.0
    """The margin that the better answer has to lead by."""

    def figures(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        policy = scores(model, batch)
        return {"loss": self.losses(policy), **watched(self.beta * policy.mean)}

    def losses(self, policy: Scores) -> Tensor:
        """The loss [pairs] of answers [2 pairs], the better ones first."""
        better, worse = policy.mean.chunk(2)
        return -F.logsigmoid(self.beta * (better - worse) - self.gamma)
