"""Direct preference optimisation. Rafailov et al. 2023, arXiv:2305.18290.

    loss = - log sigmoid(beta (r_w - r_l)),   r = log p(answer) - log p_ref(answer)      (eq. 7)

for a better answer w and a worse one l to the same prompt; the reference is what training started from, on the same
weights. Variants, of x = r_w - r_l:

    sigmoid   - (1 - e) log sigmoid(beta x) - e log sigmoid(-beta x),   e = label_smoothing
    robust    (- (1 - e) log sigmoid(beta x) + e log sigmoid(-beta x)) / (1 - 2 e)    (Chowdhury et al. 2024,
                                                                                       arXiv:2403.00409)
    hinge     max(0, 1 - beta x)                                              (Zhao et al. 2023, arXiv:2305.10425)
    ipo       (x' - 1 / (2 beta))^2, x' from log-probabilities per token      (Azar et al. 2023, arXiv:2310.12036)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import Fraction, Positive
from peftctl.tasks.preference import Preferring, watched
from peftctl.tasks.scores import Scores, reference_scores, scores
from peftctl.tasks.task import register


@register
@dataclass(frozen=True, kw_only=True)
class DPO(Preferring):
    """Prefer the better of two answers to the worse, without straying from where training started."""

    beta: Positive = 0.1
    """How close to stay to the reference: less lets the model go further."""
    variant: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """The loss of how much better the better answer has become, by the equations above."""
    label_smoothing: Fraction = 0.0
    """Share of pairs that are thought to be the wrong way round, below a half; of `sigmoid` and `robust`."""

    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.label_smoothing and self.variant in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing: `{self.variant}` has none; hint: leave it out")
        if self.label_smoothing >= 0.5:
            raise ValueError("label_smoothing: at a half and above, worse would be better; hint: swap the answers")

    def figures(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        frozen, policy = reference_scores(model, batch), scores(model, batch)
        return {"loss": self.losses(policy, frozen), **watched(self.rewards(policy, frozen))}

    def losses(self, policy: Scores, reference: Scores) -> Tensor:
        """The loss [pairs] of answers [2 pairs], the better ones first."""
        better, worse = self.rewards(policy, reference).chunk(2)
        x = better - worse
        if self.variant == "hinge":
            return torch.relu(1 - x)
        if self.variant == "ipo":
            better, worse = (policy.mean - reference.mean).chunk(2)
            return (better - worse - 1 / (2 * self.beta)).square()
        e, sign = self.label_smoothing, 1 if self.variant == "sigmoid" else -1
        smoothed = -(1 - e) * F.logsigmoid(x) - sign * e * F.logsigmoid(-x)
        return smoothed if self.variant == "sigmoid" else smoothed / (1 - 2 * e)

    def rewards(self, policy: Scores, reference: Scores) -> Tensor:
        """beta r of each answer [2 pairs]."""
        return self.beta * (policy.logps - reference.logps)
