"""Adapters that add a linear map of their input to what a linear computes: y = W x + b + U x, U [out, in]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.trained import Rebiased
from peftctl.errors import AdapterError


class Update(Rebiased):
    """x [..., in] -> y [..., out]; with `bias` the host's bias [out] is trained too."""

    scalable = True

    def __init__(self, host: nn.Module, dropout: float, bias: bool = False) -> None:
        super().__init__(host, bias)
        self.dropout = nn.Dropout(dropout)

    def update(self, x: Tensor) -> Tensor:
        """U x: x [..., in] -> [..., out], in the dtype of `x`."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """U [out, in] in float32."""
        raise NotImplementedError

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.rebiased(base(x, *args, **kwargs) + self.strength * self.update(self.dropout(x)))

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name != "weight":
            return super().merged(value, name)
        update = hosts.stored(self.host, self.strength * self.matrix())
        return (value.float() + update.to(value.device)).to(value.dtype)

    @torch.no_grad()
    def continue_from(self, earlier: Adapter) -> None:
        super().continue_from(earlier)
        if not torch.allclose(self.matrix(), cast(Update, earlier).matrix()):  # another scale, seed or way to compress
            hint = "give the method the settings that the adapter was made with"
            raise AdapterError("the tensors there would be another update here", hint)
