"""Gradient checkpointing asks for no gradient where nothing is trained, and says when a model cannot."""

from __future__ import annotations

import pytest
import torch
from tiny import build
from torch import nn

from peftctl import attach
from peftctl.errors import ModelError
from peftctl.methods.lora import LoRA
from peftctl.models.recomputing import recompute


def test_nothing_below_the_first_adapter_has_a_gradient():
    model = build("llama").train()
    attach(model, LoRA(r=2, target_modules=r".*layers\.1\..*proj"))
    recompute(model)
    wanted = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: wanted.append(out.requires_grad))
    loss = model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum()
    assert wanted == [False, True]
    loss.backward()


def test_a_model_that_cannot_says_so():
    class Stubborn(nn.Module):
        def enable_gradient_checkpointing(self) -> None:
            raise ValueError("not supported")

    with pytest.raises(ModelError, match="Stubborn cannot compute its activations again"):
        recompute(Stubborn())
