"""The `trainer` block of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from peftctl.config.block import Block, Count, Fraction, NonNegative, Positive
from peftctl.data.batches import Part, rows_per_epoch
from peftctl.engine.method import Method
from peftctl.tasks.sft import SFT
from peftctl.tasks.task import read as read_task
from peftctl.training.optimizer import Name as OptimizerName


@dataclass(frozen=True, kw_only=True)
class Trainer(Block):
    """How long, how fast and how carefully to train."""

    task: Annotated[Any, PlainValidator(read_task), WithJsonSchema({"$ref": "#/$defs/task"})] = field(
        default_factory=SFT
    )
    """What a row is, what the loss is and what is measured: the name of a task, or a mapping of its `type` and its
    fields (`peftctl tasks`). `sft` is chat, prompt and completion, or plain text."""
    epochs: Positive = 1.0
    """Passes over the training rows, where `steps` does not say how long."""
    steps: Count | None = None
    """Optimizer updates."""
    batch_size: Count = 16
    """Sequences per optimizer step, over all devices and micro-batches."""
    micro_batch_size: Count = 4
    """Sequences per forward on one device: less saves memory, the result is the same."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Lay the rows of a step end to end, in lines as long as its longest row, where padding would stand: faster, the
    result is the same. `auto`: where the model computes packed rows as it computes them alone, which is tried out, and
    at least a tenth of the work is saved."""
    learning_rate: Positive | None = None
    """Peak of the schedule; what the method suggests when left out, a tenth of it where preferences are learned."""
    optimizer: OptimizerName = "adamw"
    """Update rule; `adamw_8bit` and the paged ones come from bitsandbytes, adafactor from transformers."""
    schedule: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warmup."""
    warmup: Fraction = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices."""
    clip_norm: Positive | None = 1.0
    """Largest norm of the whole gradient; null does not clip."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """Recompute activations in the backward pass: about a quarter slower, far less memory. `offload`: on a GPU, what is
    kept of each layer, its input, waits in the machine's memory."""
    fast: Literal["auto", "off"] = "auto"
    """Compute what the model computes by a faster way, where that is exact for this model, adapter and device, which is
    tried out. `off`: as transformers does."""
    compile: bool = False
    """Compile the model with torch.compile, instead of the fast path."""
    eval_every: Count | None = None
    """Steps between evaluations on `dataset.eval`; once an epoch when left out."""
    save_every: Count | None = None
    """Steps between checkpoints; once an epoch when left out."""
    keep: Count = 2
    """Checkpoints to keep, beside the best one."""
    early_stopping: Count | None = None
    """Stop after this many evaluations in a row without a lower loss."""
    keep_best: bool = True
    """End with the adapter of the lowest evaluation loss instead of the last one, when there is `dataset.eval`."""

    def __post_init__(self) -> None:
        if self.early_stopping and not self.keep_best:
            raise ValueError("early_stopping stops after the best adapter is past; hint: set `keep_best: true` too")
        if self.steps and self.epochs != 1:
            raise ValueError("`epochs` and `steps` both say how long; hint: leave one out, as in `trainer.steps=null`")


def peak_rate(trainer: Trainer, method: Method) -> float:
    """The learning rate at the peak of the schedule: the recipe's, else what method and task suggest."""
    suggested: float = method.learning_rate * trainer.task.learning_rate_scale
    return trainer.learning_rate or suggested


def total_steps(trainer: Trainer, parts: Sequence[Part]) -> int:
    """Optimizer updates of a run over the rows of `parts`."""
    return trainer.steps or max(1, math.ceil(trainer.epochs * math.ceil(rows_per_epoch(parts) / trainer.batch_size)))
