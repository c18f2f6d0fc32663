"""What an optimizer remembers of the parameters that it updates, and what it holds while it does."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from torch import Tensor

SMALL = 4096
"""Elements below which bitsandbytes keeps 32 bits."""


def state_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Bytes between steps, on the device: pages that move to the CPU count too."""
    return sum(of_one(name, p) for p in parameters)


def of_one(name: str, p: Tensor) -> int:
    """The same of one parameter."""
    moment = p.numel() * p.element_size()
    if name == "sgd":
        return moment
    if name == "adafactor":
        rows = p.numel() // p.shape[-1] if p.ndim > 1 else 0
        return 4 * (rows + rows // p.shape[-2] * p.shape[-1]) if p.ndim > 1 else 4 * p.numel()
    if name.endswith("8bit") and p.numel() >= SMALL:
        return 2 * (p.numel() + 4 * ceil(p.numel() / 256))
    return 2 * (4 * p.numel() if "8bit" in name or "paged" in name else moment)


def update_bytes(name: str, parameters: Iterable[Tensor], cuda: bool) -> int:
    """Bytes that one update takes in passing: where no kernel does it whole, some tensors like the largest.

    In 8 bits on a CPU they are both moments, the gradient, a root and a quotient, all in float32.
    """
    if cuda and (name == "adamw" or name.endswith("8bit") or "paged" in name):
        return 0
    if name.endswith("8bit"):
        return 5 * 4 * max((p.numel() for p in parameters), default=0)
    return 2 * max((p.numel() * p.element_size() for p in parameters), default=0)
