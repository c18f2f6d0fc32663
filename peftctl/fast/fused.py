"""The pointwise parts of a layer, each made one kernel by torch's compiler: what an accelerator computes them by."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftctl.fast.plain import Plain

NAMES = ("norm", "norm_backward", "gate", "gate_backward_", "turn", "turn_back")


class Fused(Plain):
    """The same functions as `Plain`; the first call of each compiles it."""

    def __init__(self) -> None:
        for name in NAMES:
            vars(self)[name] = torch.compile(getattr(Plain, name), dynamic=True)
        vars(self)["soften"] = torch.compile(soften, dynamic=True)


def soften(logits: Tensor, labels: Tensor, cap: float | None, residual: bool) -> Tensor:
    """`models.soft.soften` without a step that has to be a kernel of its own: nothing is scattered."""
    exact = logits.float()
    slope = None
    if cap is not None:
        bent = torch.tanh(exact / cap)
        exact, slope = cap * bent, 1 - bent.square()
    whole = exact.logsumexp(dim=-1, keepdim=True)
    chosen = exact.gather(1, labels[:, None]) - whole
    if residual:
        right = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
        rest = right.float() - (exact - whole).exp()
        logits.copy_(rest if slope is None else rest * slope)
    return chosen.flatten()


@lru_cache(maxsize=1)
def fused(device: torch.device) -> Plain | None:
    """The kernels for `device`; None where they are not made, as without Triton or a C compiler, or compute wrongly."""
    made = Fused()
    try:
        return (
            made if all(same(*pair) for pair in zip(tried(made, device), tried(Plain(), device), strict=True)) else None
        )
    except Exception:  # the compiler's own, of many kinds: slower, not wrong
        return None


def tried(kernels: Plain, device: torch.device) -> list[Tensor]:
    """What every function makes of a few numbers."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, torch.bfloat16)

    x, dy, weight, g, u = drawn(6, 16), drawn(6, 16), drawn(16), drawn(6, 16), drawn(6, 16)
    y, r = kernels.norm(x, weight, 1e-6, 0.0)
    dx = kernels.norm_backward(dy, x, weight, r, 0.0, g)
    gated = kernels.gate(g.clone(), u, "silu")
    da, dg, du = dy.clone(), g.clone(), u.clone()
    kernels.gate_backward_(da, dg, du, "silu")
    heads, angles = drawn(6, 2, 8), (drawn(6, 8), drawn(6, 8))
    logits = drawn(6, 16)
    logps = kernels.soften(logits, torch.arange(6, device=device), None, True)
    return [y, r, dx, gated, da, dg, du, kernels.turn(heads, angles), kernels.turn_back(heads, angles), logits, logps]


def same(one: Any, other: Any) -> bool:
    """Whether two tensors differ by rounding."""
    return bool(torch.allclose(one.float(), other.float(), rtol=0.02, atol=0.02))
