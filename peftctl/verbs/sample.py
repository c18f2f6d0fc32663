"""What a method may look at before training: the first micro-batches of the run itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch import Tensor

from peftctl.data.batches import Layout, order
from peftctl.engine.sample import Sample
from peftctl.models.base import Base
from peftctl.recipe import Recipe
from peftctl.verbs.rows import Rows

BATCHES = 8
"""Micro-batches in a sample; a few dozen rows already rank the modules of a model."""


def sample_of(recipe: Recipe, base: Base, rows: Rows) -> Sample:
    """The first micro-batches that this run trains on, the same in every process and after a resume."""
    trainer, train = recipe.trainer, rows.task.rows(rows.train, base)
    layout = Layout(train, trainer.micro_batch_size, base.tokenizer.pad_token_id, collate=rows.task.collate)

    def batches() -> Iterator[dict[str, Tensor]]:
        steps = order(rows.train.parts, trainer.batch_size, recipe.seed, epoch=0)
        parts = (part for step in steps for part in layout.micro_batches(step))
        for part in islice(parts, BATCHES):
            yield layout.batch(part, base.device)

    return Sample(base.tokenizer, batches, rows.task.loss, base.folder)
