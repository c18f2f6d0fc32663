"""Gradient checkpointing: of what a layer computes its input alone is kept, the rest is computed again.

torch's own checkpoints do without what autograd saves; what a block keeps for its gradient is none of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def recomputed(run: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """`run(x)`, which reads `parameters`, computed a second time when its gradient is wanted."""
    if not torch.is_grad_enabled():
        return run(x)
    y: Tensor = Recomputed.apply(x, run, *parameters)  # type: ignore[no-untyped-call]
    return y


class Recomputed(torch.autograd.Function):
    """See `recomputed`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.parameters, ctx.states = run, parameters, drawn(x.device)
        return run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        inside = x.detach().requires_grad_(ctx.needs_input_grad[0])
        with again(x.device, ctx.states), torch.enable_grad():
            y = ctx.run(inside)
        places = [i for i, one in enumerate((inside, *ctx.parameters)) if one.requires_grad]
        wanted = [(inside, *ctx.parameters)[i] for i in places]
        found = dict(zip(places, torch.autograd.grad(y, wanted, dy, allow_unused=True), strict=True))
        dx, *others = (found.get(i) for i in range(1 + len(ctx.parameters)))
        return dx, None, *others


def drawn(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where random numbers stand: on the CPU, and on `device`."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def again(device: torch.device, states: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """The random numbers that were drawn from there on are drawn again in this context; afterwards it is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
        yield
