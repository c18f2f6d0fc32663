"""Odds ratio preference optimisation. Hong et al. 2024, arXiv:2403.07691.

    loss = - log p'_w - beta log sigmoid(log odds_w - log odds_l),   odds = p' / (1 - p')      (eq. 6, 7)

p' the probability of an answer per token: the geometric mean over its tokens. No reference; what is told as the reward
of an answer is beta log p'. The first term is supervised fine-tuning on the better answer: here the mean over its
tokens, of each pair for itself, where TRL takes the mean over all tokens of a micro-batch, those of prompts among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import Positive
from peftctl.tasks.preference import Preferring, watched
from peftctl.tasks.scores import Scores, scores
from peftctl.tasks.task import register


@register
@dataclass(frozen=True, kw_only=True)
class ORPO(Preferring):
    """Learn the better of two answers and turn away from the worse, in one run and without a reference."""

    beta: Positive = 0.1
    """Weight of the odds ratio beside the loss of the better answer."""

    def figures(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        policy = scores(model, batch)
        return {"loss": self.losses(policy), **watched(self.beta * policy.mean)}

    def losses(self, policy: Scores) -> Tensor:
        """The loss [pairs] of answers [2 pairs], the better ones first."""
        better, worse = policy.mean.chunk(2)
        return -better - self.beta * F.logsigmoid(log_odds(better) - log_odds(worse))


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0, without 1 - p ever rounding to zero."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - torch.log(-torch.expm1(logp))
