"""Supervised fine-tuning of a causal language model: chat, prompt and completion, plain text.

    loss = - sum over trained positions t of log p(token t | tokens before t)

summed, not averaged: the loop divides by the number of trained tokens of the whole step, over all micro-batches and
processes, so that neither changes the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.data.encode import Encoded
from peftctl.data.prepare import Prepared
from peftctl.engine.attach import takes
from peftctl.engine.sample import IGNORED
from peftctl.models.base import Base
from peftctl.tasks.task import Task, register


@register
@dataclass(frozen=True, kw_only=True)
class SFT(Task):
    """Chat, prompt and completion, or plain text: a causal language model learns what the assistant says."""

    packable: ClassVar[bool] = True

    def rows(self, prepared: Prepared, base: Base) -> Sequence[Encoded]:
        """The rows up to their last trained token."""
        return Ended(prepared.rows)

    def answers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return answer_logits(model, batch)


class Ended(Sequence[Encoded]):
    """Rows without what follows their last trained token."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.whole = rows

    def __len__(self) -> int:
        return len(self.whole)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.whole[index].ended()


def prompt_mask(labels: Tensor) -> Tensor:
    """Which positions [rows, length] come before the first that is trained; padding counts as what it stands beside."""
    answer = F.pad(labels[:, 1:] != IGNORED, (1, 0))
    return answer.cumsum(dim=1) == 0


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] in float32 and labels [n] of the n trained positions of a batch, row after row.

    `batch` holds input_ids and labels [rows, length], labels -100 where not trained, and attention_mask where rows are
    padded, position_ids where they are packed (`collate`, `collate_packed`).

    The output head runs only on columns where some row is trained, where the model's forward can leave out others.
    """
    labels = batch["labels"][:, 1:]
    wanted = labels != IGNORED
    columns = wanted.any(dim=0).nonzero().flatten()
    if len(columns) == 0:  # a rank without rows still takes part in the forward
        columns = labels.new_zeros(1)
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    if takes(model, "prompt_mask"):
        inputs["prompt_mask"] = prompt_mask(batch["labels"])
    sparse = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(**inputs, use_cache=False, **({"logits_to_keep": columns} if sparse else {})).logits
    if not sparse:
        logits = logits[:, columns]
    chosen = wanted[:, columns]
    return logits[chosen].float(), labels[:, columns][chosen]
