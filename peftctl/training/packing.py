"""Whether the rows of a run are packed: where the model computes packed rows exactly, and where it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import nn

from peftctl.data.batches import Layout, Packing, Part, order
from peftctl.data.encode import Encoded
from peftctl.errors import RecipeError
from peftctl.tasks.packable import obstacle
from peftctl.tasks.task import name_of
from peftctl.training.trainer import Trainer

GAIN = 0.1
"""Least share of the work that packing must save for `auto` to pack."""

LOOK = 64
"""Steps of the first epoch that `auto` looks at."""


def choose(
    trainer: Trainer,
    model: nn.Module,
    rows: Sequence[Encoded],
    parts: Sequence[Part],
    seed: int,
    say: Callable[[str], None],
    fast: bool = False,
) -> Packing | None:
    """How rows lie in this run, as `trainer.packing` asks; None when they are padded.

    The same for the same run: nothing but the recipe, the rows and the model decide. `fast` is whether the model leaves
    padding out by itself. Says why rows that would gain from packing are padded. Raises RecipeError where `on` cannot
    be.
    """
    if trainer.packing == "off":
        return None
    if not trainer.task.packable:
        if trainer.packing == "on":
            text = f"trainer.packing: rows of `{name_of(trainer.task)}` do not lie end to end"
            raise RecipeError(text, "leave it out: rows are padded then")
        return None
    network: Any = model
    packing: Packing = "flat" if fast or network.config._attn_implementation == "flash_attention_2" else "lines"
    if trainer.packing == "auto" and not pays(trainer, model, rows, parts, seed, packing):
        return None
    why = obstacle(model, packing)
    if why is None:
        return packing
    if trainer.packing == "on":
        raise RecipeError(f"trainer.packing: {why}", "set `packing: auto`: rows are padded then")
    say(f"rows are padded, not packed: {why}")
    return None


def pays(
    trainer: Trainer, model: nn.Module, rows: Sequence[Encoded], parts: Sequence[Part], seed: int, packing: Packing
) -> bool:
    """Whether packing saves enough of the work of the first steps; without padding and masks it always may."""
    if packing == "flat":
        return True
    steps = list(islice(order(parts, trainer.batch_size, seed, epoch=0), LOOK))
    padded, packed = (work(model, Layout(rows, trainer.micro_batch_size, 0, how), steps) for how in (None, packing))
    return packed <= (1 - GAIN) * padded


def work(model: nn.Module, layout: Layout, steps: Sequence[Sequence[int]]) -> float:
    """The work of `steps`, in that of one token in a transformer's linears.

    A layer of width h has about 12 h^2 weights, and the attention of one token in a line of w tokens takes 2 w h
    multiplications, masked or not: w / 6h of what the linears take.
    """
    network: Any = model
    wide: float = 6 * network.get_input_embeddings().weight.shape[-1]
    shapes = (layout.shape(part) for step in steps for part in layout.micro_batches(step))
    return sum(lines * width * (1 + width / wide) for lines, width in shapes)
