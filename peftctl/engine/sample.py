"""What a method may look at of the data before training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

IGNORED = -100
"""The label of a token that is not trained, as in torch's cross entropy."""


class Sample(NamedTuple):
    """The tokenizer, and a few micro-batches of the rows that will be trained on, always the same ones."""

    tokenizer: Any
    """Hugging Face tokenizer of the base model."""
    batches: Callable[[], Iterator[Mapping[str, Tensor]]]
    """Micro-batches on the device of the model: input_ids, attention_mask, labels [rows, length]."""
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    """The task's loss [nats], summed over the trained tokens of a micro-batch."""
    folder: Path | None = None
    """Where the files of the base model are, as they were before any quantisation; None when nobody knows."""
