"""The fast path: the same computation as the model's own forward, with less memory traffic and nothing done twice.

An optional room: without it everything works, slower. `faster` puts it in place for a model, where it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

from torch import nn

from peftctl.fast.compiled import available, wanted
from peftctl.fast.fits import Unfit, refuse_different, trunk_of
from peftctl.fast.plain import Plain
from peftctl.fast.trunk import Trunk

__all__ = ["faster"]


@contextmanager
def faster(model: nn.Module, say: Callable[[str], None]) -> Iterator[Trunk | None]:
    """The fast path inside this context, where `model` with its active adapters can take it; says why where not.

    Yields what stands for the model's own forward, which is back afterwards.
    """
    network: Any = model
    if network.device.type != "cpu":
        yield None  # there, transformers' attention has kernels of its own
        return
    kernels = available()
    if kernels is None and wanted():
        say("the fast path goes without compiled kernels: a C++ compiler, such as g++, makes it faster")
    vars(model)["soften"] = (kernels or Plain()).soften
    trunk: Trunk | None = None
    try:
        trunk = trunk_of(network, kernels or Plain())
        refuse_different(model, trunk)
    except Unfit as why:
        say(f"no fast path for this model: {why}")
        trunk = None
    if trunk is not None:
        vars(trunk.model)["forward"] = update_wrapper(partial(trunk), trunk.own)
    try:
        yield trunk
    finally:
        del vars(model)["soften"]
        if trunk is not None:
            del vars(trunk.model)["forward"]
            trunk.remembered.file.close()
