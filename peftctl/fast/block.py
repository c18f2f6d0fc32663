"""The two halves of a decoder layer, each one autograd function: y = x + f(norm(x)).

    attention   f = W_o attention(turn(W_q x), turn(W_k x), W_v x)
    gated       f = W_down (act(W_gate x) * W_up x)

What is cheap is computed again in the backward pass: norms, products of the gate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftctl.fast.attention import Attention, Turn
from peftctl.fast.linear import Plain as PlainLinear
from peftctl.fast.linear import linear, together
from peftctl.fast.plain import Activation, Plain
from peftctl.fast.rows import Rows


@dataclass(frozen=True)
class Norm:
    """An RMS norm: x r (shift + weight)."""

    module: nn.Module
    eps: float
    shift: float

    def forward(self, x: Tensor, kernels: Plain) -> tuple[Tensor, Tensor]:
        """x [n, width] normalised, and r [n]."""
        return kernels.norm(x, cast(Tensor, self.module.weight), self.eps, self.shift)

    def backward(self, dy: Tensor, x: Tensor, r: Tensor, residual: Tensor | None, kernels: Plain) -> Tensor:
        """The gradient of x, with `residual` added."""
        return kernels.norm_backward(dy, x, cast(Tensor, self.module.weight), r, self.shift, residual)


@dataclass(frozen=True)
class Step:
    """What all blocks of one forward share."""

    rows: Rows
    turn: Turn | None
    kernels: Plain


@dataclass(frozen=True)
class Block:
    """Half of a layer."""

    norm: Norm

    @property
    @abstractmethod
    def hosts(self) -> tuple[nn.Module, ...]:
        """Its linears."""

    @abstractmethod
    def forward(self, x: Tensor, linears: list[PlainLinear], step: Step, keep: bool) -> tuple[Tensor, Any]:
        """f(norm(x)) + x, and what `backward` needs."""

    @abstractmethod
    def backward(self, dy: Tensor, x: Tensor, linears: list[PlainLinear], step: Step, kept: Any) -> tuple[Tensor, Any]:
        """The gradient of norm(x), r, and those of the parameters of the linears, in their order."""

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        linears = [linear(host) for host in self.hosts]
        parameters = parameters_of(linears)
        keep = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
        y: Tensor = Run.apply(x, self, linears, step, keep, *parameters)  # type: ignore[no-untyped-call]
        return y

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What adapts its linears now."""
        return parameters_of([linear(host) for host in self.hosts])


class Run(torch.autograd.Function):
    """A block for autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Block, linears: list[PlainLinear], step: Step, keep: bool, *_: nn.Parameter
    ) -> Tensor:
        y, kept = block.forward(x, linears, step, keep)
        ctx.save_for_backward(x)
        ctx.block, ctx.linears, ctx.step, ctx.kept = block, linears, step, kept
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        block, linears, step, kept = ctx.block, ctx.linears, ctx.step, ctx.kept
        ctx.kept = None  # overwritten below, and free for others to take its memory
        if kept is None:
            raise RuntimeError("a second backward pass through the same forward: set `trainer.fast: off`")
        (dn, r), gradients = block.backward(dy.contiguous(), x, linears, step, kept)
        dx = block.norm.backward(dn, x, r, dy, step.kernels) if ctx.needs_input_grad[0] else None
        typed = (None if g is None else g.to(p.dtype) for g, p in zip(gradients, parameters_of(linears), strict=True))
        return dx, None, None, None, None, *typed


def parameters_of(linears: list[PlainLinear]) -> list[nn.Parameter]:
    """What is trained in them, in the order of their gradients."""
    return [p for one in linears for p in one.parameters]


@dataclass(frozen=True)
class AttentionBlock(Block):
    """The first half."""

    into: tuple[nn.Module, ...]
    """The linears of queries, keys and values, or one of all three (Phi-3)."""
    o: nn.Module
    widths: tuple[int, int, int]
    """Of all queries, keys and values of a token."""
    width: int
    """Of a head."""
    attention: Attention
    turned: bool = True
    """Whether positions turn queries and keys: SmolLM3 has layers where they do not."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def hosts(self) -> tuple[nn.Module, ...]:
        return *self.into, self.o

    def forward(self, x: Tensor, linears: list[PlainLinear], step: Step, keep: bool) -> tuple[Tensor, Any]:
        n, r = self.norm.forward(x, step.kernels)
        made, hs = zip(*(one.forward(n, keep) for one in linears[:-1]), strict=True)
        q, k, v = (one.view(len(x), -1, self.width) for one in parted(made, self.widths))
        before = (q, k)
        (q, rq), (k, rk) = (headed(norm, one, step.kernels) for norm, one in ((self.q_norm, q), (self.k_norm, k)))
        seen, kept = self.attention.forward(q, k, v, step.rows, step.turn if self.turned else None, keep)
        flat = seen.view(len(x), -1)
        y, ho = linears[-1].forward(flat, keep)
        if not keep:
            return y.add_(x), None
        return y.add_(x), (r, hs, flat, ho, kept, before if self.q_norm else None, (rq, rk))

    def backward(self, dy: Tensor, x: Tensor, linears: list[PlainLinear], step: Step, kept: Any) -> tuple[Any, Any]:
        r, hs, flat, ho, inside, before, rs = kept
        do, of_o = linears[-1].backward(dy, ho), linears[-1].gradients(dy, flat, ho)
        turn, heads = step.turn if self.turned else None, self.widths[1] // self.width
        dq, dk, dv = self.attention.backward(do.view(len(x), -1, self.width), inside, step.rows, turn, heads)
        if before is not None:
            norms = zip((self.q_norm, self.k_norm), (dq, dk), before, rs, strict=True)
            dq, dk = (headed_backward(norm, d, one, r_, step.kernels) for norm, d, one, r_ in norms)
        n, _ = self.norm.forward(x, step.kernels)
        dys = joined([d.view(len(x), -1) for d in (dq, dk, dv)], len(self.into))
        dn, of_qkv = together(linears[:-1], dys, n, hs)
        return (dn, r), [*of_qkv, *of_o]


@dataclass(frozen=True)
class GatedBlock(Block):
    """The second half."""

    into: tuple[nn.Module, ...]
    """The linears of the gate and of what goes through it, or one of both (Phi-3)."""
    down: nn.Module
    activation: Activation

    @property
    def hosts(self) -> tuple[nn.Module, ...]:
        return *self.into, self.down

    def forward(self, x: Tensor, linears: list[PlainLinear], step: Step, keep: bool) -> tuple[Tensor, Any]:
        n, r = self.norm.forward(x, step.kernels)
        made, hs = zip(*(one.forward(n, keep) for one in linears[:-1]), strict=True)
        half = sum(one.shape[1] for one in made) // 2
        g, u = parted(made, (half, half))
        y, hd = linears[-1].forward(step.kernels.gate(g, u, self.activation), keep)
        return y.add_(x), (r, g, u, hs, hd) if keep else None

    def backward(self, dy: Tensor, x: Tensor, linears: list[PlainLinear], step: Step, kept: Any) -> tuple[Any, Any]:
        r, g, u, hs, hd = kept
        inside = linears[-1].backward(dy, hd)
        step.kernels.gate_backward_(inside, g, u, self.activation)
        of_down = linears[-1].gradients(dy, inside, hd)
        n, _ = self.norm.forward(x, step.kernels)
        dn, of_gated = together(linears[:-1], joined([g, u], len(self.into)), n, hs)
        return (dn, r), [*of_gated, *of_down]


def parted(made: Sequence[Tensor], widths: Sequence[int]) -> Sequence[Tensor]:
    """What several linears made, or one in their place [tokens, sum of widths]."""
    return made if len(made) > 1 else [part.contiguous() for part in torch.split(made[0], list(widths), dim=1)]


def joined(gradients: list[Tensor], linears: int) -> list[Tensor]:
    """The way back."""
    return gradients if linears > 1 else [torch.cat(gradients, dim=1)]


def headed(norm: Norm | None, x: Tensor, kernels: Plain) -> tuple[Tensor, Tensor | None]:
    """x [tokens, heads, width] normalised head by head (Qwen3), where it is."""
    if norm is None:
        return x, None
    y, r = norm.forward(x.view(-1, x.shape[-1]), kernels)
    return y.view(x.shape), r


def headed_backward(norm: Norm | None, dy: Tensor, x: Tensor, r: Tensor | None, kernels: Plain) -> Tensor:
    """The gradient of x."""
    assert norm is not None
    assert r is not None
    flat = x.reshape(-1, x.shape[-1])
    return norm.backward(dy.view(flat.shape), flat, r, None, kernels).view(x.shape)
