"""Low-rank updates made of triplets that are measured in training, of which the least important are dropped.

y = W x + s P L Q x; triplet i is column i of P [out, r], the i-th value of the diagonal L, row i of Q [r, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.update import Update
from peftctl.errors import AdapterError


class Schedule(NamedTuple):
    """When triplets are chosen: every `deltaT` steps of `total`, but for the first `tinit` and the last `tfinal`."""

    tinit: int
    tfinal: int
    deltaT: int
    total: int

    @property
    def last(self) -> int:
        """The step of the final choice."""
        return self.total - self.tfinal

    @property
    def fits(self) -> bool:
        """Whether there are steps to choose at."""
        return self.tinit < self.last

    def due(self, step: int) -> bool:
        """Whether triplets are chosen after `step`."""
        return step == self.last or (self.tinit < step < self.last and step % self.deltaT == 0)

    def budget(self, step: int, have: int, target: int) -> int:
        """b(step): how many of `have` triplets keep their value, `target` of them in the end."""
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return have if left >= 1 else int(target + (have - target) * left**3)


class SVDLinear(Update):
    """x [..., in] -> y [..., out]; lora_A = Q [r, in], lora_E = diag(L) [r, 1], lora_B = P [out, r].

    `chosen` lists which of the triplets 0, 1, ... that it once started with these r are: all, before any were dropped.
    """

    kept: Tensor
    total_step: Tensor

    def __init__(
        self, host: nn.Module, init_r: int, chosen: Sequence[int], scale: float, dropout: float, bias: bool, steps: int
    ) -> None:
        super().__init__(host, dropout, bias)
        in_features, out_features = hosts.features(host)
        self.init_r, self.chosen, self.scale = init_r, chosen, scale
        self.lora_A = nn.Parameter(torch.randn(len(chosen), in_features) * 0.02)
        self.lora_B = nn.Parameter(torch.randn(out_features, len(chosen)) * 0.02)
        self.lora_E = nn.Parameter(torch.zeros(len(chosen), 1))
        self.register_buffer("total_step", torch.tensor(steps), persistent=False)
        self.forget()

    def forget(self) -> None:
        """What is known of the importance of triplets is nothing, and all of them are kept."""
        self.register_buffer("kept", torch.ones_like(self.lora_E[:, 0], dtype=torch.bool), persistent=False)
        for name, parameter in self.triplets().items():
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter), persistent=False)
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter), persistent=False)

    def triplets(self) -> dict[str, nn.Parameter]:
        """What importance is measured of."""
        return {"A": self.lora_A, "E": self.lora_E, "B": self.lora_B}

    def update(self, x: Tensor) -> Tensor:
        A = (self.scale * self.lora_E * self.lora_A).to(x.dtype)
        return F.linear(F.linear(x, A), self.lora_B.to(x.dtype))

    def matrix(self) -> Tensor:
        return self.lora_B @ (self.scale * self.lora_E * self.lora_A)

    def off_orthogonal(self) -> Tensor:
        """|Q Q^T - I| + |P^T P - I|."""
        eye = torch.eye(len(self.lora_E), device=self.lora_E.device)
        distances: Tensor = (self.lora_A @ self.lora_A.T - eye).norm() + (self.lora_B.T @ self.lora_B - eye).norm()
        return distances

    def watch(self, beta1: float, beta2: float) -> None:
        """Take the gradients of this step into the means."""
        for name, parameter in self.triplets().items():
            mean, deviation = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            now = torch.zeros_like(mean) if parameter.grad is None else (parameter * parameter.grad).abs()
            mean.lerp_(now, 1 - beta1)
            deviation.lerp_((now - mean).abs(), 1 - beta2)

    def importance(self) -> Tensor:
        """S [r]."""
        A, E, B = (self.get_buffer(f"sensitivity_{n}") * self.get_buffer(f"uncertainty_{n}") for n in "AEB")
        return E[:, 0] + A.mean(1) + B.mean(0)

    def drop(self) -> None:
        """Set the values of the triplets that are not kept to zero."""
        self.lora_E[~self.kept] = 0

    def rows(self) -> list[int]:
        """The triplets that do something, or may: between two choices also such that have come back since."""
        if self.lora_E.is_meta:
            return list(range(len(self.chosen)))
        return torch.nonzero(self.kept | (self.lora_E[:, 0] != 0))[:, 0].tolist()

    def ranks(self) -> list[bool]:
        """Of the triplets that it once started with, which are left."""
        left = {self.chosen[row] for row in self.rows()}
        return [number in left for number in range(self.init_r)]

    def exported(self) -> dict[str, Tensor]:
        whole, rows = super().exported(), self.rows()
        if len(rows) == len(self.chosen):
            return whole
        part = {"lora_A": self.lora_A[rows], "lora_E": self.lora_E[rows], "lora_B": self.lora_B[:, rows]}
        return whole | part

    @torch.no_grad()
    def continue_from(self, earlier: Adapter) -> None:
        """As `earlier` computes, with the triplets that it has left: what was dropped does not come back."""
        if not isinstance(earlier, SVDLinear) or self.init_r != earlier.init_r:
            there = f"a {type(earlier).__name__} that started with {getattr(earlier, 'init_r', 'no')} triplets"
            raise AdapterError(f"{there} there, {self.init_r} here", "give `method.init_r` that number")
        rows = earlier.rows()
        self.chosen = [earlier.chosen[row] for row in rows]
        values = earlier.lora_E[rows] * (earlier.scale / self.scale)
        for name, part in (("A", earlier.lora_A[rows]), ("E", values), ("B", earlier.lora_B[:, rows])):
            fresh = part.new_empty(part.shape)  # of no rows, too: a part of nothing has strides that autograd warns of
            setattr(self, f"lora_{name}", nn.Parameter(fresh.copy_(part)))
        if self.bias is not None and earlier.bias is not None:
            self.bias.copy_(earlier.bias)
        self.forget()


def choose(adapters: Sequence[SVDLinear], budget: int) -> None:
    """Keep the `budget` most important triplets of all `adapters`; of equal ones, the first."""
    device = adapters[0].lora_E.device
    scores = torch.cat([adapter.importance().to(device) for adapter in adapters])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.sort(descending=True, stable=True).indices[:budget]] = True
    parts = torch.split(kept, [len(adapter.chosen) for adapter in adapters])
    for adapter, part in zip(adapters, parts, strict=True):
        adapter.kept.copy_(part)
