"""The linears inside a block, forward and backward, with what adapts them.

    plain      y = W x
    low rank   y = W x + s B A x: nothing is kept for the gradient but x, which the block keeps, and A x [tokens, r]
    any other  as its adapters compute it, differentiated by torch inside the block

Hosts in 4 bits are dequantised once in each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Stack
from peftctl.engine.low_rank import LoRALinear

Gradients = list[Tensor | None]


class Plain:
    """x [tokens, in] -> y [tokens, out]."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained here."""
        return []

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, Any]:
        """y, and what `backward` needs beside x."""
        return F.linear(x, hosts.weight(self.host).to(x.dtype), hosts.bias(self.host)), None

    def backward(self, dy: Tensor, kept: Any, into: Tensor | None = None) -> Tensor:
        """The gradient of x, added to `into` where that is given."""
        weight = hosts.weight(self.host).to(dy.dtype)
        return dy @ weight if into is None else into.addmm_(dy, weight)

    def gradients(self, dy: Tensor, x: Tensor, kept: Any) -> Gradients:
        """Those of the parameters, after `backward`."""
        return []


class LowRank(Plain):
    """With one LoRA around it."""

    def __init__(self, host: nn.Module, adapter: LoRALinear) -> None:
        super().__init__(host)
        self.adapter = adapter
        self.scale = adapter.strength * adapter.scale

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [cast(nn.Parameter, self.adapter.lora_A.weight), cast(nn.Parameter, self.adapter.lora_B.weight)]

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, Any]:
        y, _ = super().forward(x, keep)
        A, B = (factor.to(x.dtype) for factor in self.adapter.factors())
        mask = None
        if self.adapter.training and self.adapter.dropout.p:
            x, mask = torch.native_dropout(x, self.adapter.dropout.p, True)
        h = x @ A.T
        return y.addmm_(h, B.T, alpha=self.scale), (h, mask) if keep else None

    def backward(self, dy: Tensor, kept: Any, into: Tensor | None = None) -> Tensor:
        dx, dh, mask = super().backward(dy, None, into), self.of_hidden(dy), kept[1]
        A = self.adapter.factors()[0].to(dy.dtype)
        return dx.addmm_(dh, A) if mask is None else dx.add_((dh @ A).mul_(mask), alpha=self.spared)

    def gradients(self, dy: Tensor, x: Tensor, kept: Any) -> Gradients:
        h, mask = kept
        if mask is not None:
            x = (x * mask).mul_(self.spared)
        return [self.of_hidden(dy).T @ x, (h.T @ dy).T * self.scale]

    def of_hidden(self, dy: Tensor) -> Tensor:
        """The gradient [tokens, r] of A x."""
        return (dy @ self.adapter.factors()[1].to(dy.dtype)).mul_(self.scale)

    @property
    def spared(self) -> float:
        """What dropout multiplies by what it leaves."""
        return 1 / (1 - self.adapter.dropout.p)


class Adapted(Plain):
    """With whatever adapts it."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.host.parameters() if p.requires_grad]

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, Any]:
        if not keep:
            return self.host(x), None
        with torch.enable_grad():
            inside = x.detach().requires_grad_()
            y = self.host(inside)
        # a copy: what comes next may write over it, and the graph may hold it
        return y.detach().clone(), [inside, get_gradient_edge(y)]

    def backward(self, dy: Tensor, kept: Any, into: Tensor | None = None) -> Tensor:
        inside, edge = kept
        dx, *kept[:] = torch.autograd.grad(edge, [inside, *self.parameters], dy, allow_unused=True)
        return dx if into is None else into.add_(dx)

    def gradients(self, dy: Tensor, x: Tensor, kept: Any) -> Gradients:
        return list(kept)


def linear(host: nn.Module) -> Plain:
    """The linear `host` as its active adapters have it now."""
    stack = host._modules.get("adapters")
    active = [cast(Adapter, stack[name]) for name in stack.active] if isinstance(stack, Stack) else []
    if not active:
        return Plain(host)
    only = active[0]
    if len(active) == 1 and type(only) is LoRALinear and sum(1 for _ in only.parameters()) == 2:
        return LowRank(host, only)
    return Adapted(host)


def together(
    linears: Sequence[Plain], dys: Sequence[Tensor], x: Tensor, kept: Sequence[Any]
) -> tuple[Tensor, Gradients]:
    """The gradient of x, which several linears read, and those of all their parameters."""
    dx: Tensor | None = None
    gradients: Gradients = []
    for one, dy, what in zip(linears, dys, kept, strict=True):
        dx = one.backward(dy, what, dx)
        gradients += one.gradients(dy, x, what)
    assert dx is not None
    return dx, gradients
