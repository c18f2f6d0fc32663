"""Whether a model computes packed rows as it computes them alone: found out by trying."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.data.batches import Layout, Packing
from peftctl.data.encode import Encoded
from peftctl.engine.adapter import Stack
from peftctl.engine.attach import methods
from peftctl.engine.inputs import evaluating
from peftctl.engine.method import name_of
from peftctl.models.quiet import reason

LENGTHS = (7, 5, 9, 1)
"""Tokens of the rows tried: the first two share a line, so do the others, and what they leave is padded."""

ROUNDING: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference that is rounding, relative to the largest logit. SmolLM2-135M has 0.03 in bfloat16 and 3e-6 in
float32; a token that sees another row makes 0.3 to 0.6."""

LOOSEST = 0.1
"""The same, where padded rows differ from each alone too."""


@torch.no_grad()
def obstacle(model: nn.Module, packing: Packing) -> str | None:
    """Why the rows of `model` with its active adapters cannot be packed; None when they can.

    A few random rows are packed twice, the second time with other tokens in the first of them: the logits of the
    others must not change, and must be those of each row alone, up to rounding. A forward that fails is an obstacle.
    With weights in 8 bits all tokens of a batch share the scales of outliers, padded or packed: rounding is what that
    does to padded rows.
    """
    stack = model._modules.get("adapters")
    for method in [methods(model)[name] for name in stack.active] if isinstance(stack, Stack) else ():
        if not method.in_place:
            return f"`{name_of(method)}` acts on whole lines, not on the rows in them"
    network: Any = model
    kind = type(model).__name__
    try:
        size = network.get_input_embeddings().num_embeddings
        rows = random_rows(size)
        others = [Encoded(array("i", [(token + 1) % size for token in rows[0].ids]), ()), *rows[1:]]
        with evaluating(model):
            alone = [logits(model, rows, [[i]], None)[0] for i in range(len(rows))]
            padded = logits(model, rows, [[i] for i in range(len(rows))], None)
            first, second = (logits(model, made, [[0, 1], [2, 3]], packing) for made in (rows, others))
    except Exception as error:  # a foreign forward: whatever it raises, the model is what cannot do it
        return f"{kind} does not take packed rows: {reason(error)}"
    largest = max(float(one.abs().max()) for one in alone)
    allowed = max(ROUNDING[network.dtype] * largest, min(4 * distance(padded, alone), LOOSEST * largest))
    if not distance(first[1:], second[1:]) <= allowed:
        return f"{kind} lets a token see the row before it in the same line"
    if not distance(first, alone) <= allowed:
        return f"{kind} computes a packed row differently from the row alone"
    return None


def random_rows(size: int) -> list[Encoded]:
    """Rows of tokens below `size`, the same each time."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(size, (length,), generator=generator).tolist() for length in LENGTHS)
    return [Encoded(array("i", ids), ()) for ids in drawn]


def logits(model: nn.Module, rows: Sequence[Encoded], bins: list[list[int]], packing: Packing | None) -> list[Tensor]:
    """The logits [tokens, vocabulary] of each row of `bins`, in their order."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    batch = Layout(rows, len(bins), 0, packing).batch(bins, device)
    computed = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    sizes = [[len(rows[row]) for row in bin] for bin in bins]
    lines = [list(chain.from_iterable(sizes))] if packing == "flat" else sizes
    return [row for line, of in zip(computed, lines, strict=True) for row in line[: sum(of)].split(of)]


def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference between two lists of tensors; NaN where there is one."""
    return float(torch.stack([(one - other).abs().max() for one, other in zip(some, others, strict=True)]).max())
