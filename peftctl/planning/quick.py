"""The fast path (`peftctl/fast`) without content: its own code over kernels that compute nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def quickened(model: Any, batch: Any, device: str) -> Iterator[list[bool]]:
    """Let a model without content take the fast path on `batch`, where it would; yields a list with an item when it is.

    `device` is the kind of device that is planned for: cpu, cuda.

    What it looks at in the batch, the lengths of its rows and what they have in common, it finds there as it will be.
    """
    if device not in ("cpu", "cuda") or importlib.util.find_spec("peftctl.fast") is None:
        yield []
        return
    from peftctl.fast import rows
    from peftctl.fast import trunk as trunks
    from peftctl.fast.attention import Attention
    from peftctl.fast.compiled import Compiled
    from peftctl.fast.fits import Unfit, trunk_of
    from peftctl.fast.flash import Flash

    class Silent(Compiled):
        """Kernels that return what is the right size."""

        def __init__(self) -> None:
            pass

        def call(self, name: str, first: Any, *others: Any) -> None:
            pass

        @staticmethod
        def turn(x: Any, turn: Any) -> Any:
            return torch.empty_like(x)

        turn_back = turn

    arranged = rows.arranged
    taken: list[bool] = []

    def known(ids: Any, mask: Any, positions: Any, shape: torch.Size, share: bool) -> Any:
        """How the rows lie, by the batch with its content where that is what is asked for."""
        taken.append(True)
        real = batch.tensors.get("input_ids")
        with _disable_current_modes():
            if real is not None and real.shape == shape:
                return arranged(real, batch.tensors.get("attention_mask"), None, shape, share)
            return arranged(torch.zeros(shape, dtype=torch.long), torch.ones(shape), None, shape, False)

    vars(model)["soften"] = Silent().soften
    try:
        trunk = trunk_of(model, Silent(), Attention if device == "cpu" else Flash)
    except Unfit:
        yield []
        del vars(model)["soften"]
        return
    vars(trunk.model)["forward"] = update_wrapper(partial(trunk), trunk.own)
    try:
        with patch.object(trunks, "arranged", known):
            yield taken
    finally:
        del vars(trunk.model)["forward"], vars(model)["soften"]
