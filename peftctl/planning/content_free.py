"""Modules and tensors that have shapes, dtypes and a device, and no content: whatever their size, they are free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class ContentFree(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode of one plan. A tensor's copy belongs to the same mode: a copied mode would free what the first holds."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ContentFree:
        return self


@contextmanager
def content_free(device: torch.device) -> Iterator[FakeTensorMode]:
    """Inside, every new tensor has no content, and lies on `device` where nobody says otherwise.

    The device need not be there: what is planned for a GPU elsewhere is told that it lies on the CPU.
    """
    here = device if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()) else "cpu"
    with (
        ContentFree(allow_non_fake_inputs=True) as mode,
        torch.device(here),
        patch.object(nn.Module, "_apply", applied),
        torch.random.fork_rng(devices=[]),
    ):
        yield mode


def applied(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for modules without content, whose parameters torch refuses to swap."""
    made: dict[int, nn.Parameter] = {}
    for each in module.modules() if recurse else [module]:
        for name, parameter in list(each._parameters.items()):
            if parameter is None:
                continue
            moved = fn(parameter.detach())
            if (moved.dtype, moved.device, moved.shape) != (parameter.dtype, parameter.device, parameter.shape):
                new = made.setdefault(id(parameter), nn.Parameter(moved, parameter.requires_grad))
                each._parameters[name] = new
        for name, buffer in list(each._buffers.items()):
            if buffer is not None:
                each._buffers[name] = fn(buffer)
    return module


def bytes_of(tensors: Any) -> int:
    """Bytes of the storages of tensors, each once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())
