"""What every method promises under data parallelism: two processes compute the gradient of one, for every parameter."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from methods.settings import SETTINGS, made
from tiny import build, inputs, stir
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peftctl
from peftctl.engine.attach import trained

METHODS = [method for method, setting in SETTINGS.items() if {"llama", "gpt2"} & set(setting.zoo)]


def shape(method: str) -> str:
    return "llama" if "llama" in SETTINGS[method].zoo else "gpt2"


def attached(method: str) -> nn.Module:
    made_first = made(method, shape(method))  # it may draw random numbers; the model starts their sequence anew
    model = peftctl.attach(build(shape(method)), made_first)
    stir(model)
    return model


def gradients(model: nn.Module, wrapped: nn.Module, rows: slice) -> dict[str, Tensor]:
    """After two steps: a parameter that one step left out makes the next one fail under DDP."""
    batch = {key: value[rows] for key, value in inputs(model, rows=4).items()}
    for _ in range(2):
        model.zero_grad()
        wrapped(**batch).logits.square().mean().backward()
    return {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    """One process of two: half the rows, every method in turn; rank 0 writes the gradients down."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for method in METHODS:
        model = attached(method)
        found[method] = gradients(model, DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    import socket

    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    found: dict[str, dict[str, Tensor]] = torch.load(folder / "gradients.pt", weights_only=True)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_compute_the_gradient_of_one(method: str, of_two: dict[str, dict[str, Tensor]]):
    model = attached(method)
    alone = gradients(model, model, slice(0, 4))
    assert alone.keys() == trained(model).keys(), "a trained parameter that nothing reaches"
    assert of_two[method].keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(
            of_two[method][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
