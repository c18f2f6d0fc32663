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
from peftctl.engine.trained import Rebiased
from peftctl.errors import AdapterError, NotMergeable


class LowRank(Rebiased):
    """What the forms below share: the scale and the merged weight; with `bias` the host's bias [out] is trained too."""

    scalable = True

    def __init__(self, host: nn.Module, scale: float, bias: bool = False) -> None:
        super().__init__(host, bias)
        self.scale = scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] that are trained; of a convolution, the kernel's positions count as inputs."""
        raise NotImplementedError

    def plain(self) -> tuple[Tensor, Tensor]:
        """A and B of the plain LoRA that computes the same, perhaps of a higher rank."""
        return self.factors()

    @property
    def rank(self) -> int:
        """The rank that is trained."""
        return len(self.factors()[0])

    @torch.no_grad()
    def start_with(self, A: Tensor, B: Tensor) -> None:
        """Let the update start with these factors."""
        for mine, given in zip(self.factors(), (A, B), strict=True):
            mine.copy_(given)

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
            return super().merged(value, name)
        A, B = self.plain()
        update = hosts.stored(self.host, (self.strength * self.scale) * (B.float() @ A.float()))
        return (value.float() + update.to(value.device).reshape(value.shape)).to(value.dtype)


class LoRALinear(LowRank):
    """x [..., in] -> y [..., out]."""

    def __init__(self, host: nn.Module, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__(host, scale, bias)
        in_features, out_features = hosts.features(host)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = Linear(in_features, rank, bias=False)
        self.lora_B = Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as the paper's loralib and HF PEFT
        nn.init.zeros_(self.lora_B.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight, self.lora_B.weight

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.rebiased(base(x, *args, **kwargs) + (self.strength * self.scale) * self.update(self.dropout(x)))

    def update(self, x: Tensor) -> Tensor:
        """B A x."""
        update: Tensor = self.lora_B(self.lora_A(x))
        return update


class LoRAFromStart(LoRALinear):
    """A LoRA that is not zero at its start, (A0, B0), and changes nothing there: y = W x + s (B A - B0 A0) x.

    On disk it is a plain LoRA of twice the rank, [A; A0] and [B, -B0].
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, host: nn.Module, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__(host, rank, scale, dropout, bias)
        self.register_buffer("start_A", torch.zeros_like(self.lora_A.weight))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B.weight))

    def plain(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)

    @torch.no_grad()
    def start_with(self, A: Tensor, B: Tensor) -> None:
        for mine, given in ((self.lora_A.weight, A), (self.start_A, A), (self.lora_B.weight, B), (self.start_B, B)):
            mine.copy_(given)

    def update(self, x: Tensor) -> Tensor:
        """(B - B0) A x + B0 (A - A0) x: in half precision, BA x - B0 A0 x would round away what little was learned."""
        A, B = self.factors()
        changed = F.linear(F.linear(x, A.to(x.dtype)), (B - self.start_B).to(x.dtype))
        return changed + F.linear(F.linear(x, (A - self.start_A).to(x.dtype)), self.start_B.to(x.dtype))

    def exported(self) -> dict[str, Tensor]:
        A, B = self.plain()
        own = {} if self.bias is None else {"bias": self.bias}
        return own | {"lora_A.weight": A, "lora_B.weight": B}


class LoRAEmbedding(LowRank):
    """ids [...] -> y [..., width]; lora_embedding_A [r, rows], lora_embedding_B [width, r]."""

    def __init__(self, host: nn.Module, rank: int, scale: float) -> None:
        super().__init__(host, scale)
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


class LoRAConv(LowRank):
    """x [rows, in, *size] -> y [rows, out, *new size]; A is a convolution like its host, B one of width 1.

    In a host with groups, A crosses them as in HF PEFT, so that the update fits no weight of the host.
    """

    def __init__(self, host: nn.Conv1d | nn.Conv2d, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__(host, scale, bias)
        conv: Any = nn.Conv1d if isinstance(host, nn.Conv1d) else nn.Conv2d
        kind = type(host).__name__
        if (type(host).forward, type(host)._conv_forward) != (conv.forward, conv._conv_forward):
            raise AdapterError(f"method.target_modules: a {kind} computes more than its convolution", "leave it out")
        if rank % host.groups:
            hint = "choose another `r`, give it one in `rank_pattern`, or leave it out"
            raise AdapterError(f"method.r: {rank} is no multiple of the {host.groups} groups of a {kind}", hint)
        size, mode = (host.kernel_size, host.stride, host.padding, host.dilation), host.padding_mode
        self.dropout = nn.Dropout(dropout)
        self.lora_A: nn.Conv1d | nn.Conv2d = conv(host.in_channels, rank, *size, bias=False, padding_mode=mode)
        self.lora_B: nn.Conv1d | nn.Conv2d = conv(rank, host.out_channels, 1, groups=host.groups, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight.flatten(1), self.lora_B.weight.flatten(1)

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        low = self.lora_A._conv_forward(self.dropout(x), self.lora_A.weight.to(x.dtype), None)
        update = self.lora_B._conv_forward(low, self.lora_B.weight.to(x.dtype), None)
        return self.rebiased(base(x, *args, **kwargs) + (self.strength * self.scale) * update)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        groups = self.lora_B.groups
        if groups > 1:
            raise NotMergeable(f"its update crosses the {groups} groups of the convolution", "keep the adapter")
        return super().merged(value, name)
