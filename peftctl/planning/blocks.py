"""A deep model is looked at through a few of its blocks: the others are the same, and take as much again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftctl.planning.step import Step, deeper

FEW = (3, 4)
"""Blocks that are looked at."""


def whole_step(model: Any, take: Callable[[], Step]) -> Step:
    """The step of the whole model: all of it taken, or what a few of its blocks tell where those are alike."""
    lists = alike(model)
    depth = min((len(blocks) for _, _, blocks in lists), default=0)
    if depth <= FEW[1] or any(len(blocks) != depth for _, _, blocks in lists):
        return take()
    with cut(model, lists, FEW[0]):
        shallow = take()
    with cut(model, lists, FEW[1]):
        deep = take()
    return deeper(shallow, deep, (depth - FEW[1]) / (FEW[1] - FEW[0]))


Blocks = tuple[nn.Module, str, nn.ModuleList]


def alike(model: nn.Module) -> list[Blocks]:
    """The lists of blocks, with their parents; none where some blocks of a list are not as the others.

    The first may be different: T5 keeps a table there.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > FEW[1]
    ]
    return found if all(len({shape(block) for block in blocks[1:]}) == 1 for _, _, blocks in found) else []


def shape(block: nn.Module) -> tuple[Any, ...]:
    """What decides what a block takes."""
    named = [*block.named_parameters(), *block.named_buffers()]
    kind = getattr(block, "attention_type", None), getattr(getattr(block, "self_attn", None), "sliding_window", None)
    return type(block), *kind, *((name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in named)


@contextmanager
def cut(model: Any, lists: list[Blocks], depth: int) -> Iterator[None]:
    """Only the first `depth` blocks of each list."""
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    named = [
        (config, name, vars(config)[name])
        for config in configs.values()
        for name in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
        if name in vars(config)
    ]
    for parent, name, blocks in lists:
        setattr(parent, name, nn.ModuleList(list(blocks)[:depth]))
    for config, name, _ in named:
        setattr(config, name, depth)
    try:
        yield
    finally:
        for parent, name, blocks in lists:
            setattr(parent, name, blocks)
        for config, name, value in named:
            setattr(config, name, value)
