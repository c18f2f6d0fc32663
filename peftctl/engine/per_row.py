"""Each row of a batch with an adapter of its own: one model serves many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from peftctl.engine.attach import adapters_of, methods, refuse_without_base, stacks, unattached
from peftctl.errors import AdapterError, Problem


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside this context row i of a batch uses the adapter `names[i]` alone, and None the base.

    For inference. A batch may have a multiple of `len(names)` rows, as beam search makes it: each name then stands for
    as many rows in a row. Raises AdapterError for adapters that are not attached, and for those around a block or a
    whole model, which share things between rows that cannot be taken apart.
    """
    if not names:
        raise AdapterError("rows: no names", "one name, or None, for each row of the batch")
    wanted = dict.fromkeys(name for name in names if name is not None)
    problems = [problem for name in wanted for problem in unusable(model, name)]
    if problems:
        raise AdapterError.of(problems)
    if None in names:
        refuse_without_base(model, "rows")
    before = [(stack, stack.rows, stack.active) for _, _, stack in stacks(model)]
    try:
        for stack, _, _ in before:
            stack.rows, stack.active = tuple(names) if stack.keys() & wanted.keys() else None, ()
        yield model
    finally:
        for stack, earlier, active in before:
            stack.rows, stack.active = earlier, active


def unusable(model: nn.Module, name: str) -> Iterator[Problem]:
    """Why rows cannot choose the adapter `name`."""
    if name not in methods(model):
        yield unattached(model, name)
    for site, adapter in adapters_of(model, name).items():
        if any(child is not adapter.host.adapters for child in adapter.host.children()):
            what = f"stands around `{site or type(model).__name__}`, which has parts that see all rows together"
            yield Problem(f"adapter `{name}`: {what}", "activate one adapter at a time")
            return
