from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from peftctl.planning.content_free import content_free
from peftctl.planning.ledger import Ledger


def test_bytes_are_booked_while_they_are_alive():
    with content_free(torch.device("cpu")):
        x = torch.empty(1000, 10)
        ledger = Ledger()
        ledger.leave_out([x])
        with ledger:
            y = x * 2
            z = y.view(-1)[:5]
            assert ledger.live.total() == 40_000  # a view takes nothing
            del y
            assert ledger.live.total() == 40_000
            del z
            assert ledger.live.total() == 0
            x @ torch.empty(10, 7)
    assert ledger.flops == 2 * 1000 * 10 * 7
    assert max(moment.total() for moment in ledger.moments.values()) == 40_000


def test_what_depends_on_content_is_taken_from_the_share_that_is_trained():
    with content_free(torch.device("cpu")):
        x, mask = torch.empty(4, 8, 3, requires_grad=True), torch.empty(4, 8, dtype=torch.bool)
        with Ledger(share=0.25):
            chosen = x[mask]
            assert chosen.shape == (8, 3)
            chosen.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == x.shape
            assert mask.any(dim=0).nonzero().shape == (8, 1)
            assert not bool(mask.all())


def test_a_real_step_holds_what_the_imagined_one_does():
    def step(x: torch.Tensor, w: torch.Tensor) -> None:
        torch.nn.functional.gelu(x @ w).square().mean().backward()

    peaks = []
    with content_free(torch.device("cpu")), Ledger() as ledger:
        step(torch.empty(64, 32), torch.empty(32, 16, requires_grad=True))
        peaks.append(max(moment.total() for moment in ledger.moments.values()))
    with Ledger() as ledger:
        step(torch.empty(64, 32), torch.empty(32, 16, requires_grad=True))
        peaks.append(max(moment.total() for moment in ledger.moments.values()))
    assert peaks[0] == peaks[1]


def test_what_outlives_the_ledger_is_not_watched():
    kept = torch.nn.Linear(4, 4)
    with Ledger() as ledger:
        copies = [parameter.detach() for parameter in kept.parameters()]
    assert not ledger._watched
    del kept, copies  # with a watch on them, torch would crash now


def test_a_copy_belongs_to_the_plan_of_the_original():
    with content_free(torch.device("cpu")) as mode:
        copy = deepcopy(nn.Linear(3, 4))
    assert copy.weight.fake_mode is copy.bias.fake_mode is mode
