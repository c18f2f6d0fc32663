"""Loss and perplexity over rows, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftctl.data.batches import collate
from peftctl.data.encode import Encoded
from peftctl.engine.inputs import evaluating
from peftctl.tasks import sft


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Encoded], batch_size: int, pad_id: int, accelerator: Any) -> float:
    """Mean cross-entropy [nats] per trained token of `rows`, over all processes; the model's mode stays as it was.

    Rows go in order of length, so that little is padded.
    """
    with evaluating(model):
        ordered = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        total = torch.zeros((), dtype=torch.float64)
        batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        for batch in batches[accelerator.process_index :: accelerator.num_processes]:
            inputs = collate([rows[i] for i in batch], pad_id)
            total += sft.loss(model, {k: v.to(accelerator.device) for k, v in inputs.items()}).double().cpu()
        summed = accelerator.reduce(total.float().to(accelerator.device), "sum")
        return float(summed) / sum(row.trained for row in rows)
