"""What a forward keeps for its backward, moved from a GPU to the machine's memory in between.

With gradient checkpointing that is little more than the input of each layer: 2 bytes x tokens x width for each in
bfloat16, 2.7 GB for a model of 65B at 2,048 tokens. The copies go out and come back in the order of the computation, on
its own stream, so nothing waits for the processor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1 << 20
"""Bytes of the smallest tensor that is worth the way."""


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context, what autograd saves of the computation on a GPU lies in pinned memory until it is read."""

    def __init__(self) -> None:
        super().__init__(pack, unpack)


def worth_it(tensor: Tensor) -> bool:
    """Whether a saved tensor is worth moving: weights, and what else no operation made, stay where they are."""
    return tensor.nbytes >= LEAST and not tensor.is_leaf and not isinstance(tensor, nn.Parameter)


def pack(tensor: Tensor) -> Any:
    """The tensor, or what brings it back."""
    if not (tensor.is_cuda and worth_it(tensor)):
        return tensor
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    there.copy_(tensor, non_blocking=True)
    return there, tensor.device


def unpack(kept: Any) -> Tensor:
    """The way back."""
    if isinstance(kept, Tensor):
        return kept
    there, device = kept
    back: Tensor = there.to(device, non_blocking=True)
    return back
