from __future__ import annotations

import pytest
import torch

from peftctl.planning.optimizer import state_bytes
from peftctl.training.optimizer import build_optimizer


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adamw_8bit"])
def test_the_state_is_as_large_as_the_real_one(name: str):
    parameters = [torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.randn(32))]
    update = build_optimizer(name, [{"params": parameters, "lr": 1e-3}], 0.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    update.step()
    held = [value for state in update.state.values() for value in state.values() if torch.is_tensor(value)]
    maps = 2 * 256 * 4 if "8bit" in name else 0  # of the 8-bit numbers, shared by all
    real = sum(value.numel() * value.element_size() for value in held) - maps
    assert state_bytes(name, parameters) == pytest.approx(real, rel=0.01, abs=16)
