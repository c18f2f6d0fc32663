"""A toy run with everything that a resume can get wrong."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from peftctl.training import checkpoint, filesystem, snapshot
from peftctl.training.tensors import write_tensors


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=True)
    return optimizer


def adamw_8bit(parameters: Any) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=1)
    try:
        weight = nn.Parameter(torch.ones(64, 64))
        weight.grad = torch.ones(64, 64)
        bitsandbytes.optim.AdamW8bit([weight], min_8bit_size=1).step()
    except Exception as error:
        pytest.skip(f"this bitsandbytes has no 8-bit optimizer for the CPU: {error}")
    return optimizer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adamw_amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True, fused=False),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd_plain": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "adafactor": adafactor,
    "adamw_8bit": adamw_8bit,
}


class Run:
    """A toy run whose steps draw from every random generator: dropout, rows, and a schedule over two groups."""

    def __init__(self, folder: Path, optimizer: str = "adamw", *, seed: int = 0, dtype: torch.dtype = torch.float32):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        layers = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.3), nn.BatchNorm1d(32), nn.Linear(32, 64)).to(dtype)
        self.model, self.folder, self.step = layers, folder, 0
        groups = [{"params": list(layers[0].parameters())}, {"params": list(layers[2:].parameters()), "lr": 3e-2}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.names = {parameter: name for name, parameter in layers.named_parameters()}

    @property
    def trainable(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def train(self, steps: int) -> None:
        for _ in range(steps):
            scale = random.random() + random.gauss(0, 1) + numpy.random.standard_normal()
            rows = torch.randn(8, 64, dtype=next(self.model.parameters()).dtype)
            self.model(rows * scale).pow(2).mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1

    def save(self) -> Path:
        return checkpoint.save(
            self.folder,
            self.step,
            trainable=self.trainable,
            optimizer=self.optimizer,
            names=self.names,
            scheduler=self.scheduler,
            state={"epoch": 0, "best": -math.inf, "cursor": (1, self.step)},
            write_adapter=self.write_adapter,
        )

    def write_adapter(self, folder: Path) -> None:
        filesystem.new_folder(folder)
        filesystem.write(folder / "adapter_config.json", [b"{}"])
        write_tensors(folder / "adapter_model.safetensors", dict(self.model[0].named_parameters()))

    def resume(self) -> checkpoint.Checkpoint:
        found, _ = checkpoint.latest(self.folder)
        assert found is not None
        checkpoint.restore(found, self.trainable, self.optimizer, self.names, self.scheduler)
        found.restore_rng()
        self.step = found.step
        return found

    def digest(self) -> str:
        """Every bit that the next step depends on."""
        record, moments = snapshot.optimizer_record(self.optimizer, self.names)
        tensors = self.trainable | moments | snapshot.rng_state()
        sha256 = hashlib.sha256(json.dumps([record, self.scheduler.state_dict()], default=str).encode())
        for name in sorted(tensors):
            value = tensors[name].detach().contiguous()
            sha256.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            sha256.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha256.hexdigest()


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())
