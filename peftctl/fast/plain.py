"""The pointwise parts of a decoder layer in torch's operations: what `kernels.cpp` computes, in one line each.

They run on every device, and on a CPU where there is no compiler.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftctl.models.soft import soften

Activation = Literal["silu", "gelu_tanh"]


class Plain:
    """Functions that write into what they are given where their names say so, and otherwise return new tensors."""

    soften = staticmethod(soften)

    @staticmethod
    def norm(x: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
        """RMS norm of x [n, width]: x r (shift + weight), and r [n] = 1 / sqrt(mean(x^2) + eps), in float32.

        Without a shift the product is rounded as Llama rounds it, with one as Gemma does.
        """
        exact = x.float()
        inverse = torch.rsqrt(exact.square().mean(-1) + eps)
        scaled = exact * inverse[:, None]
        y = weight * scaled.to(x.dtype) if shift == 0 else (scaled * (shift + weight.float())).to(x.dtype)
        return y, inverse

    @staticmethod
    def norm_backward(
        dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, shift: float, residual: Tensor | None
    ) -> Tensor:
        """The gradient [n, width] of x, with `residual` added."""
        d = dy.float() * (shift + weight.float())
        unit = x.float() * inverse[:, None]
        dx = (inverse[:, None] * (d - unit * (d * unit).mean(-1, keepdim=True))).to(x.dtype)
        return dx if residual is None else dx.add_(residual)

    @staticmethod
    def gate(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
        """activation(g) u."""
        return acted(g, activation).mul_(u)

    @staticmethod
    def gate_backward_(da: Tensor, g: Tensor, u: Tensor, activation: Activation) -> None:
        """g and u become their gradients, da [n, width] what `gate` had returned."""
        a = acted(g, activation)
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(da * u, g, grad_input=g)
        else:
            torch.ops.aten.gelu_backward.grad_input(da * u, g, approximate="tanh", grad_input=g)
        out = a * u
        torch.mul(da, a, out=u)
        da.copy_(out)

    @staticmethod
    def turn(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x [tokens, heads, width] turned by (cos, sin) [tokens, width]."""
        cos, sin = (one[:, None] for one in turn)
        low, high = x.chunk(2, dim=-1)
        return (x * cos).addcmul_(torch.cat([-high, low], dim=-1), sin)

    @staticmethod
    def turn_back(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """The transpose of `turn`."""
        cos, sin = (one[:, None] for one in turn)
        low, high = (x * sin).chunk(2, dim=-1)
        return (x * cos).add_(torch.cat([high, -low], dim=-1))

    @staticmethod
    def arrange(x: Tensor, index: Tensor, turn: tuple[Tensor, Tensor] | None, scale: float = 1.0) -> Tensor:
        """Tokens [tokens, heads, width] as rows [n, heads, length, width], turned by (cos, sin) [tokens, width].

        `index` [n, length] says which token stands where; -1 is padding, and zero.
        """
        if turn is not None:
            x = Plain.turn(x, turn)
        if scale != 1:
            x = x * scale
        tokens, heads, width = x.shape
        rows = x.reshape(tokens, -1).index_select(0, index.clamp(min=0).flatten()).view(*index.shape, heads, width)
        if bool((index < 0).any()):
            rows.mul_((index >= 0)[..., None, None])
        return rows.transpose(1, 2).contiguous()

    @staticmethod
    def restore_(
        out: Tensor, rows: Tensor, index: Tensor, turn: tuple[Tensor, Tensor] | None, scale: float = 1.0
    ) -> None:
        """The way back, into `out` [tokens, heads, width]: the transpose of `arrange`, for tokens that stand once."""
        there = index >= 0
        tokens = index[there]
        x = rows.transpose(1, 2)[there]
        if turn is not None:
            x = Plain.turn_back(x, (turn[0][tokens], turn[1][tokens]))
        out[tokens] = x * scale if scale != 1 else x

    @staticmethod
    def attend_(p: Tensor, queries: int, offset: int, window: int) -> None:
        """Scores [n, rows, keys] become probabilities; rows are several heads' queries, one behind another.

        Query i sees the keys up to offset + i, the last `window` of them if that is not 0.
        """
        torch.softmax(p.add_(hidden(p, queries, offset, window)), dim=-1, out=p)

    @staticmethod
    def attend_backward_(d: Tensor, p: Tensor, queries: int, offset: int, window: int) -> None:
        """Gradients of the probabilities become those of the scores."""
        torch.ops.aten._softmax_backward_data.out(d, p, -1, p.dtype, grad_input=d)


def hidden(p: Tensor, queries: int, offset: int, window: int) -> Tensor:
    """Minus infinity for the keys that a row of `p` does not see, else 0 [rows, keys]."""
    last = offset + torch.arange(p.shape[1], device=p.device)[:, None] % queries
    keys = torch.arange(p.shape[2], device=p.device)
    seen = (keys <= last) & (keys > last - window) if window else keys <= last
    return torch.zeros(seen.shape, dtype=p.dtype, device=p.device).masked_fill_(~seen, float("-inf"))


def acted(g: Tensor, activation: Activation) -> Tensor:
    """The activation."""
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
