"""Rows are computed up to their last trained token, with the loss and the gradients of the whole rows."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from peftctl import attach
from peftctl.data.batches import Layout
from peftctl.data.encode import Encoded
from peftctl.engine.attach import trained
from peftctl.methods.lora import LoRA
from peftctl.tasks.sft import SFT, Ended
from tests.tiny import build, stir

ROWS = [
    Encoded(array("i", range(3, 15)), ((2, 4), (6, 9))),
    Encoded(array("i", range(30, 36)), ((4, 6),)),
    Encoded(array("i", range(50, 55)), ()),
]


def test_what_comes_behind_the_last_trained_token_is_left_out() -> None:
    ended = Ended(ROWS)
    assert [len(row) for row in ended] == [9, 6, 5]
    assert [row.spans for row in ended[0:2]] == [row.spans for row in ROWS[0:2]]


@pytest.mark.parametrize("packing", [None, "lines", "flat"])
def test_loss_and_gradients_stay(packing: Any) -> None:
    torch.manual_seed(0)
    model = build("llama")
    attach(model, LoRA(r=2))
    stir(model)

    def computed(rows: Any) -> list[torch.Tensor]:
        layout = Layout(rows, 3, 0, packing)
        (part,) = layout.micro_batches(range(3))
        loss = SFT().loss(model, layout.batch(part, torch.device("cpu")))
        return [loss, *torch.autograd.grad(loss, list(trained(model).values()))]

    for one, other in zip(computed(Ended(ROWS)), computed(ROWS), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
