"""DoRA: a weight is a magnitude and a direction; LoRA turns the direction. Liu et al. 2024, arXiv:2402.09353.

W' = m (W + s B A) / ||W + s B A||               (eq. 5; the norm is that of each output's row)

W [out, in] frozen, m [out], A [r, in], B [out, r], s = alpha / r. m starts at ||W|| and B at zero, so training starts
from the base model. For the gradient the norm is a constant (sec. 4.3). Neither W' nor B A is ever built:

y = b + g (W x + s B A x),   g = m / ||W + s B A||
||W + s B A||^2 = ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2,   <W, B A> = (W A^T) . B,   ||B A||^2 = (B A A^T) . B

with b [out] the host's bias, g [out], and . the product of rows. Dropout acts on the x of B A x alone, as in LoRA. (The
authors' code and HF PEFT also drop it from (g - 1) W x: the same in expectation, for a second product with W.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site
from peftctl.engine.low_rank import LoRAEmbedding, LoRALinear, LowRank
from peftctl.engine.method import register
from peftctl.engine.starts import FROM_START
from peftctl.methods.lora import LoRA


def row_norms(W: Tensor) -> Tensor:
    """||W|| of each row, float32: W [out, in] -> [out]."""
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))
    return norms.float()


@torch.no_grad()
def updated_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + s B A|| of each row, float32 but for W A^T, which has the precision of W: -> [out].

    Rows that B A all but cancels count as rounding leaves them: the terms' difference has no more right digits.
    """
    A, B = A.float(), scale * B.float()
    crossed = (F.linear(W, A.to(W.dtype)) * B).sum(1).float()
    squares = row_norms(W).square() + (B @ (A @ A.T) * B).sum(1)
    rounding = squares * torch.finfo(W.dtype).eps
    return torch.maximum(squares + 2 * crossed, rounding).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


class Magnified(torch.autograd.Function):
    """g (y - b + s B low) + b with g = m / norm: y [..., out], low [..., r], B [out, r], m [out], norm [out], b [out].

    Differentiated by hand, because what takes time here is every pass over something as large as y.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, low: Tensor, B: Tensor, m: Tensor, norm: Tensor, scale: float, bias: Tensor | None
    ) -> Tensor:
        gain = m / norm
        change = (gain - 1).to(y.dtype)  # bfloat16 holds a gain of 1.003 as 1, and a change of 0.003
        gained = (scale * gain * B.T).to(y.dtype)
        ctx.save_for_backward(y, low, B, norm, bias, gain, change, gained)
        ctx.scale = scale
        z = torch.addcmul(y, y if bias is None else y - bias, change)
        return rows(z).addmm_(rows(low), gained).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        y, low, B, norm, bias, gain, change, gained = ctx.saved_tensors
        dy = torch.addcmul(dz, dz, change) if ctx.needs_input_grad[0] else None
        outer = (rows(low).T @ rows(dz)).to(B.dtype)
        along = rows(dz * y).sum(0).to(gain.dtype)
        if bias is not None:
            along -= bias * rows(dz).sum(0)
        dm = (along + ctx.scale * (outer * B.T).sum(0)) / norm
        return dy, dz @ gained.T, (ctx.scale * gain * outer).T, dm, None, None, None


def rows(x: Tensor) -> Tensor:
    """[..., width] as a matrix."""
    return x.reshape(-1, x.shape[-1])


class DoRAAdapter(LowRank):
    """What the two forms below share: the magnitude, and what becomes of a weight."""

    scalable = False

    lora_magnitude_vector: nn.Parameter

    def magnitude(self, host: nn.Module) -> nn.Parameter:
        """m [out] at its start; of no value in a skeleton without weights, which is filled from a folder."""
        W = hosts.weight(host)
        skeleton = W.is_meta or self.factors()[0].is_meta
        return nn.Parameter(torch.ones(len(W)) if skeleton else row_norms(W.detach()))

    def magnified(self, y: Tensor, low: Tensor, factor: float = 1.0) -> Tensor:
        """What the host returned, `y`, with A x = `low` added, and turned to the magnitude m."""
        A, B = self.factors()
        norm = updated_norms(hosts.weight(self.host), A, B, self.scale)
        bias, m = hosts.bias(self.host), self.lora_magnitude_vector
        z = Magnified.apply(y, low.to(y.dtype), B, m, norm, factor * self.scale, bias)  # type: ignore[no-untyped-call]
        return cast(Tensor, z)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name != "weight":
            return super().merged(value, name)
        kept = self.host.get_parameter("weight")
        own = hosts.stored(self.host, value if kept.is_meta else kept)  # others may have changed `value` already
        A, B, m = (tensor.to(own.device) for tensor in (*self.factors(), self.lora_magnitude_vector))
        gain = hosts.stored(self.host, (m / updated_norms(own.float(), A, B, self.scale))[:, None])
        return (gain.to(value.device) * super().merged(value.float())).to(value.dtype)


class DoRALinear(DoRAAdapter, LoRALinear):
    """x [..., in] -> y [..., out]; with `bias` the host's bias [out] is trained too."""

    def __init__(self, host: nn.Module, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__(host, rank, scale, dropout, bias)
        self.lora_magnitude_vector = self.magnitude(host)

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.magnified(base(x, *args, **kwargs), self.lora_A(self.dropout(x)))
        return self.rebiased(y)


class DoRAEmbedding(DoRAAdapter, LoRAEmbedding):
    """ids [...] -> y [..., width]; m is that of each of the `width` outputs, over the whole vocabulary."""

    def __init__(self, host: nn.Module, rank: int, scale: float) -> None:
        super().__init__(host, rank, scale)
        self.lora_magnitude_vector = self.magnitude(host)

    def forward(self, base: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        low = F.embedding(ids, self.lora_embedding_A.T)
        return self.magnified(base(ids, *args, **kwargs), low, getattr(self.host, "embed_scale", 1.0))


@register
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA that learns the magnitude of each output's weights beside their direction: good at low ranks."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2402.09353"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights in FROM_START or (self.init_weights == "loftq" and not self.init_from):
            text = f"init_weights: `{self.init_weights}` starts away from the weight whose magnitude is learned"
            raise ValueError(f"{text}; hint: take one that starts at the base, such as `orthogonal` or `eva`")

    def adapter(self, site: Site) -> Adapter:
        rank, scale = self.rank(site.name), self.scale(site.name)
        if isinstance(site.module, nn.Embedding):
            return DoRAEmbedding(site.module, rank, scale)
        return DoRALinear(site.module, rank, scale, self.dropout, self.bias != "none")

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return super().peft_config(adapters) | {"use_dora": True}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("use_dora")) and super().reads({**config, "use_dora": False})

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> LoRA:
        return super().from_peft({**config, "use_dora": False}, shapes, place)
