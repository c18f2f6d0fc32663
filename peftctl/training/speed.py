"""The fast path (`peftctl/fast`), where a recipe wants it and the folder is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from peftctl.data.encode import Encoded
from peftctl.data.survey import Meter
from peftctl.tasks.task import Batch, Task
from peftctl.training.trainer import Trainer

ROWS = 25
"""Rows whose hidden states are computed at once."""


class Fast(Protocol):
    """What stands for a model's own forward."""

    @property
    def trained(self) -> int:
        """The first layer with adapters."""

    def room(self, tokens: int) -> bool:
        """Whether what comes out of the layers below it can be kept for so many tokens."""

    def remember(self, ids: Tensor, mask: Tensor) -> None:
        """Keep it, of a batch [rows, width]."""


@contextmanager
def quickened(trainer: Trainer, model: nn.Module, say: Callable[[str], None]) -> Iterator[Fast | None]:
    """Let `model` take the fast path inside this context, where it is exact; yields what it takes, if it does."""
    if trainer.fast == "off" or trainer.compile or importlib.util.find_spec("peftctl.fast") is None:
        yield None
        return
    from peftctl.fast import faster

    with faster(model, say) as fast:
        yield fast


def once(
    fast: Fast | None,
    model: nn.Module,
    task: Task,
    sets: Sequence[Sequence[Encoded]],
    pad_id: int,
    tick: Meter,
    say: Callable[[str], None],
) -> None:
    """Compute what stays as it is of all rows of `sets`, before they are seen again and again.

    The rows go in order of their lengths: what is kept does not depend on the order of training.
    """

    def batches() -> Iterator[Batch]:
        for rows in sets:
            ordered = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            for start in range(0, len(rows), ROWS):
                batch = task.collate([rows[i] for i in ordered[start : start + ROWS]], pad_id)
                yield {name: tensor.to(model.device) for name, tensor in batch.items()}  # type: ignore[arg-type]
                tick("computed", min(start + ROWS, len(rows)), len(rows))

    tokens = sum(len(row) for rows in sets for row in rows)
    if fast is not None and fast.trained and fast.room(tokens):
        say(f"{fast.trained} layers lie below the first that is trained: what they make of the rows is computed once")
        for batch in batches():
            fast.remember(batch["input_ids"], batch["attention_mask"])
    task.once(model, batches())
