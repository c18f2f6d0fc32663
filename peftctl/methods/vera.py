"""VeRA: one pair of frozen random matrices for all linears, two trained vectors each. Kopiczko et al. 2023,
arXiv:2310.11454.

y = W x + diag(b) B diag(d) A x                  (eq. 2)

W [out, in] frozen; A [r, in], B [out, r] random, frozen, the same for all linears; d [r], b [out] trained. b starts at
zero, so training starts from the base model. The linears differ in size: each takes the first columns of one
A [r, widest in] and the first rows of one B [widest out, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import Count, Positive, Probability, Seed
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site
from peftctl.engine.biased import Biased
from peftctl.engine.method import register
from peftctl.engine.peft_config import Reader
from peftctl.engine.update import Update


class Projections(nn.Module):
    """A and B, held once for all adapters. `kept` says whether they are saved or drawn again from the seed."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, rank: int, in_features: int, out_features: int, seed: int, kept: bool) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        self.register_buffer("vera_A", drawn(rank, in_features, generator), persistent=kept)
        self.register_buffer("vera_B", drawn(out_features, rank, generator), persistent=kept)


def drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix [rows, columns] of the numbers that HF PEFT draws: uniform, of variance 2 / columns."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, columns)
    bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))  # rounded in this order, for the same bits
    return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)


class VeRALinear(Update):
    """x [..., in] -> y [..., out]; vera_lambda_d [r] scales between A and B, vera_lambda_b [out] behind B."""

    def __init__(self, host: nn.Module, projections: Projections, d_initial: float, dropout: float, bias: bool) -> None:
        super().__init__(host, dropout, bias)
        self.in_features, self.out_features = hosts.features(host)
        self.projections = projections
        self.vera_lambda_d = nn.Parameter(torch.full((len(projections.vera_A),), float(d_initial)))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features))

    def factors(self) -> tuple[Tensor, Tensor]:
        """This host's part of A [r, in] and of B [out, r], where its own parameters are."""
        A, B = self.projections.vera_A, self.projections.vera_B
        device = self.vera_lambda_d.device  # a model over several devices has the projections on one of them
        return A[:, : self.in_features].to(device), B[: self.out_features].to(device)

    def update(self, x: Tensor) -> Tensor:
        A, B, d, b = (t.to(x.dtype) for t in (*self.factors(), self.vera_lambda_d, self.vera_lambda_b))
        return b * F.linear(d * F.linear(x, A), B)

    def matrix(self) -> Tensor:
        A, B = self.factors()
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)

    def peft_key(self, site: str, leaf: str) -> str:
        shared = leaf.startswith("projections.")
        return leaf.replace("projections.", "base_model.") if shared else super().peft_key(site, leaf)


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(Biased):
    """Vectors on shared random projections: a tenth of LoRA's parameters, or less."""

    r: Count = 256
    """Rows of the shared A: the rank of the update. A rank costs one parameter a linear, so it can be high."""
    d_initial: Positive = 0.1
    """What every entry of d starts at."""
    dropout: Probability = 0.0
    """Fraction of the adapter's inputs dropped in training."""
    projection_prng_key: Seed = 0
    """Seed of A and B."""
    save_projection: bool = True
    """Save A and B with the adapter; without them it is smaller, and loads right where torch draws the same numbers."""
    bias: Literal["none", "all", "vera_only"] = "none"
    """Biases trained beside the update: of no module, of all, of the adapted ones."""

    peft_type: ClassVar[str] = "VERA"
    learning_rate: ClassVar[float] = 4e-3  # the paper's for instruction tuning, ten times LoRA's
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    paper: ClassVar[str] = "Kopiczko et al. 2023, arXiv:2310.11454"

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        targets = self.targets(model)
        inputs, outputs = zip(*(hosts.features(site.module) for site in targets), strict=True)
        shared = Projections(self.r, max(inputs), max(outputs), self.projection_prng_key, self.save_projection)
        biases = self.bias != "none"
        adapters = [VeRALinear(site.module, shared, self.d_initial, self.dropout, biases) for site in targets]
        return adapters + super().build(model, sites[len(targets) :])

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        placed = self.placed(adapters, VeRALinear)
        return (
            VERA
            | placed
            | {
                "r": self.r,
                "d_initial": self.d_initial,
                "vera_dropout": self.dropout,
                "projection_prng_key": self.projection_prng_key,
                "save_projection": self.save_projection,
                "bias": self.bias,
                "fan_in_fan_out": hosts.any_conv1d(adapters[name].host for name in placed["target_modules"]),
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> VeRA:
        read = Reader(config, place)
        read.supported(VERA, set(VERA))
        sites = read.sites(shapes, D, "VeRA")
        r = read.count("r", VERA["r"], most=MOST_RANKS)
        method = cls(
            r=r,
            d_initial=read.number("d_initial", VERA["d_initial"]),
            dropout=read.number("vera_dropout", VERA["vera_dropout"], most=1),
            projection_prng_key=read.count("projection_prng_key", VERA["projection_prng_key"], least=0, most=2**63),
            save_projection=read.flag("save_projection", VERA["save_projection"]),
            bias=read.choice("bias", ("none", "all", "vera_only")),  # type: ignore[arg-type]
            target_modules=sorted(sites),
            modules_to_save=read.saved(shapes),
        )
        read.done()
        read.same_ranks(sites, lambda name: r)
        read.done()
        return method


MOST_RANKS = 1 << 14
"""Of a folder that a stranger wrote: without A and B in it nothing else bounds their size."""

D = ".vera_lambda_d"

VERA: dict[str, Any] = {
    "bias": "none",
    "d_initial": 0.1,
    "fan_in_fan_out": False,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "projection_prng_key": 0,
    "r": 256,
    "save_projection": True,
    "target_modules": None,
    "vera_dropout": 0.0,
}
"""VeraConfig's own keys with its defaults."""
