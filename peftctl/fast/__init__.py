"""The fast path: the same computation as the model's own forward, with less memory traffic and nothing done twice.

An optional room: without it everything works, slower. `faster` puts it in place for a model, where it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn

from peftctl.fast.attention import Attention
from peftctl.fast.compiled import available, wanted
from peftctl.fast.fits import Unfit, refuse_different, trunk_of
from peftctl.fast.flash import Flash
from peftctl.fast.fused import fused
from peftctl.fast.plain import Plain
from peftctl.fast.trunk import Trunk

__all__ = ["faster"]


@contextmanager
def faster(model: nn.Module, say: Callable[[str], None]) -> Iterator[Trunk | None]:
    """The fast path inside this context, where `model` with its active adapters can take it; says why where not.

    Yields what stands for the model's own forward, which is back afterwards.
    """
    network: Any = model
    if network.device.type not in ("cpu", "cuda"):
        yield None
        return
    kernels, attention = tools(network.device, say)
    vars(model)["soften"] = kernels.soften
    trunk: Trunk | None = None
    try:
        trunk = trunk_of(network, kernels, attention)
        refuse_different(model, trunk)
    except Unfit as why:
        say(f"no fast path for this model: {why}")
        trunk = None
    except RuntimeError as error:  # a kernel that this card, driver or dtype has not
        say(f"no fast path for this model: {str(error).splitlines()[0]}")
        trunk = None
    if trunk is not None:
        vars(trunk.model)["forward"] = update_wrapper(partial(trunk), trunk.own)
    try:
        yield trunk
    finally:
        del vars(model)["soften"]
        if trunk is not None:
            del vars(trunk.model)["forward"]
            trunk.remembered.close()


def tools(device: torch.device, say: Callable[[str], None]) -> tuple[Plain, type[Attention]]:
    """What computes the pointwise parts and attention on `device`; says what would make them faster."""
    kernels: Plain | None
    if device.type == "cpu":
        kernels, attention = available(), Attention
        if kernels is None and wanted():
            say("the fast path goes without compiled kernels: a C++ compiler, such as g++, makes it faster")
    else:
        kernels, attention = fused(device) if wanted() else None, Flash
        if kernels is None and wanted():
            say("the fast path goes without compiled kernels: Triton and a C compiler, such as gcc, make it faster")
    return kernels or Plain(), attention
