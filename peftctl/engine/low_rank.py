"""Adapters that add a low-rank update to what their host computes: y = W x + s B A x, A [r, in], B [out, r]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Linear
from peftctl.engine.trained import own_bias, rebiased
from peftctl.errors import AdapterError


class LowRank(Adapter):
    """What the two forms below share: the scale and the merged weight."""

    scalable = True

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        raise NotImplementedError

    @torch.no_grad()
    def continue_from(self, earlier: Adapter) -> None:
        """As `earlier` computes, whatever its scale; with a higher rank here, the ranks that it lacks stay as drawn."""
        if not isinstance(earlier, LowRank) or type(self) is not type(earlier):
            super().continue_from(earlier)
            return
        rank, more = len(earlier.factors()[0]), len(self.factors()[0])
        if rank > more:
            hint = "raise `method.r`, or shrink that adapter first: `peftctl adapters resize`"
            raise AdapterError(f"rank {rank} there, {more} here", hint)
        mine = self.state_dict(keep_vars=True)
        for leaf, tensor in earlier.state_dict().items():
            mine[leaf][tuple(slice(0, size) for size in tensor.shape)] = tensor
        self.factors()[1][:, :rank] *= earlier.scale / self.scale

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name != "weight":
            return value
        A, B = self.factors()
        update = hosts.stored(self.host, (self.strength * self.scale) * (B.float() @ A.float()))
        return (value.float() + update.to(value.device)).to(value.dtype)


class LoRALinear(LowRank):
    """x [..., in] -> y [..., out]; with `bias` the host's bias [out] is trained too."""

    def __init__(self, host: nn.Module, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__(scale)
        in_features, out_features = hosts.features(host)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = Linear(in_features, rank, bias=False)
        self.lora_B = Linear(rank, out_features, bias=False)
        self.bias = own_bias(host) if bias else None
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as the paper's loralib and HF PEFT
        nn.init.zeros_(self.lora_B.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight, self.lora_B.weight

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs) + (self.strength * self.scale) * self.lora_B(self.lora_A(self.dropout(x)))
        return rebiased(y, self.host, self.bias)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name == "bias" and self.bias is not None:
            return self.bias.detach().to(value)
        return super().merged(value, name)

    def peft_key(self, site: str, leaf: str) -> str:
        return super().peft_key(site, "base_layer.bias" if leaf == "bias" else leaf)


class LoRAEmbedding(LowRank):
    """ids [...] -> y [..., width]; lora_embedding_A [r, rows], lora_embedding_B [width, r]."""

    def __init__(self, host: nn.Module, rank: int, scale: float) -> None:
        super().__init__(scale)
        rows, width = hosts.features(host)
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, rows))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, base: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(ids, *args, **kwargs)
        scale = self.strength * self.scale * getattr(self.host, "embed_scale", 1.0)  # Gemma multiplies its embeddings
        low = F.embedding(ids, self.lora_embedding_A.T).to(y.dtype)
        return y + scale * F.linear(low, self.lora_embedding_B.to(y.dtype))
