"""The fast path (`peftctl/fast`), where a recipe wants it and the folder is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from peftctl.training.trainer import Trainer


@contextmanager
def quickened(trainer: Trainer, model: nn.Module, say: Callable[[str], None]) -> Iterator[bool]:
    """Let `model` take the fast path inside this context, where it is exact; yields whether it does."""
    if trainer.fast == "off" or trainer.compile or importlib.util.find_spec("peftctl.fast") is None:
        yield False
        return
    from peftctl.fast import faster

    with faster(model, say) as fast:
        yield fast
