"""Delta-LoRA: the weight follows the low-rank update. Zi et al. 2023, arXiv:2309.02411.

W(t+1) = W(t) + lambda s (B(t+1) A(t+1) - B(t) A(t))     after each optimizer step t > K   (algorithm 1)
y = W(t) x + s B A x                                     with the gradient of A and B from s B A x alone

W [out, in], A [r, in], B [out, r], s = alpha / r. The differences telescope, so the weight need not be touched, and
may be stored in 4 bits: with (A_K, B_K) as they were when it would have started to move,

y = W x + s ((1 + lambda) B A - lambda B_K A_K) x

which is a plain LoRA of rank 2 r, and the form on disk. There is no dropout: the paper takes it out, because with it
the gradient of W would not be that of B A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import Natural, Positive
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site
from peftctl.engine.attach import adapters_of, methods
from peftctl.engine.low_rank import LoRAFromStart
from peftctl.engine.method import register
from peftctl.engine.sample import Sample
from peftctl.engine.starts import FROM_START
from peftctl.methods.lora import LoRA


class DeltaLoRALinear(LoRAFromStart):
    """x [..., in] -> y [..., out], since the weight began to move at (A_K, B_K)."""

    def __init__(self, host: nn.Module, rank: int, scale: float, bias: bool, update_ratio: float) -> None:
        super().__init__(host, rank, scale, 0.0, bias)
        self.update_ratio = update_ratio
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Let the weight have moved by nothing until now."""
        self.start_A.copy_(self.lora_A.weight)
        self.start_B.copy_(self.lora_B.weight)

    def plain(self) -> tuple[Tensor, Tensor]:
        """A [2 r, in] and B [out, 2 r], with the gradients of B A alone."""
        more = 1 + self.update_ratio
        A, B = (factor.detach() + (factor - factor.detach()) / more for factor in self.factors())
        return torch.cat([A, self.start_A]), torch.cat([more * B, -self.update_ratio * self.start_B], dim=1)

    def update(self, x: Tensor) -> Tensor:
        A, B = self.plain()
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


@register
@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LoRA):
    """LoRA whose frozen weight moves along with every change of its update; saved as a plain LoRA of twice the rank."""

    update_ratio: Positive = 0.5
    """Lambda: the share of each change of the update that the weight moves by, too."""
    start_steps: Natural = 0
    """K: the weight rests until after this many optimizer steps, and the one after them."""

    paper: ClassVar[str] = "Zi et al. 2023, arXiv:2309.02411"
    clashes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "method.init_from": ("what it saves is a plain LoRA", "go on from that with `type: lora`")
    }
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError("dropout: with it the weight's gradient is not the update's; hint: leave it out")
        if self.init_weights in FROM_START:
            text = f"init_weights: `{self.init_weights}` subtracts its start from the weight, which moves here"
            raise ValueError(f"{text}; hint: take one that starts at zero, such as `orthogonal` or `eva`")

    def adapter(self, site: Site) -> Adapter:
        rank, scale = self.rank(site.name), self.scale(site.name)
        return DeltaLoRALinear(site.module, rank, scale, self.bias != "none", self.update_ratio)

    def start(self, model: nn.Module, name: str, sample: Sample | None) -> None:
        super().start(model, name, sample)
        hold(adapters_of(model, name))

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        if step <= self.start_steps:
            for name in (name for name, method in methods(model).items() if method == self):
                hold(adapters_of(model, name))

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        more = math.sqrt(2) if self.use_rslora else 2  # leaves the scale as it is
        doubled = replace(
            self,
            r=2 * self.r,
            alpha=more * self.alpha,
            rank_pattern={pattern: 2 * rank for pattern, rank in self.rank_pattern.items()},
            alpha_pattern={pattern: more * alpha for pattern, alpha in self.alpha_pattern.items()},
        )
        return super(DeltaLoRA, doubled).peft_config(adapters)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return False  # what it writes is a LoRA


def hold(adapters: Mapping[str, Adapter]) -> None:
    """Let no weight under the `adapters` have moved yet."""
    for adapter in adapters.values():
        if isinstance(adapter, DeltaLoRALinear):
            adapter.hold()
