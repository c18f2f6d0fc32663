"""Linears in 4 and 8 bits without content: what bitsandbytes keeps of a weight, and what it computes with.

Frozen; a product unpacks the whole weight, forward and backward, and keeps nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.engine import hosts

BLOCK, NESTED = 64, 256
"""Weights that share a scale, and scales that share one when they are quantised too."""


class Unpacked(torch.autograd.Function):
    """y = x W^T + b with a packed W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Quantised) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.unpacked(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream @ ctx.module.unpacked(upstream.dtype), None


class Quantised(nn.Module):
    """x [..., in] -> y [..., out]."""

    def __init__(self, like: nn.Module, state: int) -> None:
        """`like` has in_features, out_features and bias; `state` is bytes of quantisation state."""
        super().__init__()
        source: Any = like
        self.in_features, self.out_features = hosts.features(like)
        self.source_cls = type(like)
        self.weight = self.packed()
        self.bias = source.bias
        self.register_buffer("state", torch.empty(state, dtype=torch.uint8), persistent=False)

    def packed(self) -> nn.Parameter:
        """The weight as it is kept."""
        raise NotImplementedError

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight as it is multiplied by."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return Unpacked.apply(x, self)  # type: ignore[no-untyped-call,no-any-return]


class Linear4bit(Quantised):
    """Two weights a byte."""

    def packed(self) -> nn.Parameter:
        from bitsandbytes.functional import QuantState

        weights = self.in_features * self.out_features
        kept = nn.Parameter(torch.empty(ceil(weights / 2), 1, dtype=torch.uint8), requires_grad=False)
        scales, shape = torch.empty(0), torch.Size((self.out_features, self.in_features))
        state = QuantState(scales, shape, torch.empty(16), BLOCK, "nf4", torch.get_default_dtype())
        vars(kept)["quant_state"] = state  # for who unpacks it by bitsandbytes' own means
        return kept


class Linear8bitLt(Quantised):
    """A weight a byte."""

    def packed(self) -> nn.Parameter:
        kept = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=torch.int8), requires_grad=False)
        vars(kept)["SCB"] = torch.empty(self.out_features)
        return kept


def state_bytes(weights: int, quantization: str, double: bool, rows: int) -> int:
    """Bytes of the scales of so many weights."""
    if quantization == "int8":
        return 4 * rows
    scales = ceil(weights / BLOCK)
    return scales + 4 * ceil(scales / NESTED) + 4 * 256 if double else 4 * scales


def quantise(model: nn.Module, names: Iterable[str], quantization: str, double: bool) -> None:
    """Replace the linears `names` of a model without content."""
    kind = Linear8bitLt if quantization == "int8" else Linear4bit
    for name in names:
        module: Any = model.get_submodule(name)
        inside, outside = hosts.features(module)
        state = state_bytes(inside * outside, quantization, double, outside)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, kind(module, state))
