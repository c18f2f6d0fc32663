"""GraLoRA: an own low-rank update for every block of a weight. Jung et al. 2025, arXiv:2505.20355.

Cut into k x k blocks of [out/k, in/k], the update in block (j, n) is

dW_jn = s B_jn A_jn,   s = alpha / (r + hybrid_r)       (section 3)

A_jn [r/k, in/k], B_jn [out/k, r/k]: as many parameters as LoRA of rank r, and a rank of up to k r for the whole. With
`hybrid_r` a LoRA of that rank over the whole weight is added, with the same s. On disk, as in HF PEFT, A is one tensor
[n, in/k, r], whose last r hold the A_jn of j = 1, 2, ..., and B one tensor [j, r, out/k], whose r hold the B_jn of
n = 1, 2, .... B starts at zero, so training starts from the base model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftctl.config.block import Count, Natural, Positive, Probability
from peftctl.config.quote import quoted
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Linear
from peftctl.engine.anatomy import Site
from peftctl.engine.biased import Biased
from peftctl.engine.method import register
from peftctl.engine.peft_config import Reader
from peftctl.engine.update import Update
from peftctl.errors import AdapterError, Problem


class GraLoRALinear(Update):
    """x [..., in] -> y [..., out]; gralora_A [k, in/k, r], gralora_B [k, r, out/k]."""

    def __init__(
        self, host: nn.Module, k: int, rank: int, hybrid_rank: int, scale: float, dropout: float, bias: bool
    ) -> None:
        super().__init__(host, dropout, bias)
        self.scale = scale
        in_features, out_features = hosts.features(host)
        bound = 1 / math.sqrt(in_features // k)  # as HF PEFT starts the A of each block, and LoRA the whole one
        self.gralora_A = nn.Parameter(torch.empty(k, in_features // k, rank).uniform_(-bound, bound))
        self.gralora_B = nn.Parameter(torch.zeros(k, rank, out_features // k))
        if hybrid_rank:
            self.gralora_A_general = Linear(in_features, hybrid_rank, bias=False)
            self.gralora_B_general = Linear(hybrid_rank, out_features, bias=False)
            nn.init.kaiming_uniform_(self.gralora_A_general.weight, a=math.sqrt(5))
            nn.init.zeros_(self.gralora_B_general.weight)
        self.hybrid = hybrid_rank > 0

    def blocks(self) -> tuple[Tensor, Tensor]:
        """A [n, in/k, j, r/k] and B [j, n, r/k, out/k]: n numbers the blocks of the input, j those of the output."""
        A, B = self.gralora_A, self.gralora_B
        k, rows, rank = A.shape
        return A.reshape(k, rows, k, rank // k), B.reshape(k, k, rank // k, -1)

    def update(self, x: Tensor) -> Tensor:
        A, B = (t.to(x.dtype) for t in self.blocks())
        low = self.scale * torch.einsum("...ni,nijq->...njq", x.reshape(*x.shape[:-1], len(A), -1), A)
        y = torch.einsum("...njq,jnqo->...jo", low, B).flatten(-2)
        return y + self.gralora_B_general(self.scale * self.gralora_A_general(x)) if self.hybrid else y

    def matrix(self) -> Tensor:
        A, B = self.blocks()
        update = torch.einsum("nijq,jnqo->joni", A, B).flatten(2).flatten(0, 1)
        if self.hybrid:
            update = update + self.gralora_B_general.weight @ self.gralora_A_general.weight
        return self.scale * update


@register
@dataclass(frozen=True, kw_only=True)
class GraLoRA(Biased):
    """Low-rank updates block by block: the rank of a large LoRA at the price of a small one."""

    r: Count = 32
    """Rank of the update of a whole row of blocks; each block gets r / k of it."""
    k: Count = 2
    """Blocks along each side of a weight; the paper takes 2 up to rank 32, and 4 from rank 64."""
    hybrid_r: Natural = 0
    """Rank of a LoRA over the whole weight, added to the blocks."""
    alpha: Positive = 64
    """Numerator of the scale: the update is multiplied by alpha / (r + hybrid_r)."""
    dropout: Probability = 0.0
    """Fraction of the adapter's inputs dropped in training."""
    bias: Literal["none", "all", "gralora_only"] = "none"
    """Biases trained beside the update: of no module, of all, of the adapted ones."""

    peft_type: ClassVar[str] = "GRALORA"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    paper: ClassVar[str] = "Jung et al. 2025, arXiv:2505.20355"

    def __post_init__(self) -> None:
        if self.r % self.k:
            raise ValueError(f"the rank {self.r} cannot be shared by {self.k} blocks; hint: make `r` a multiple of `k`")

    def targets(self, model: nn.Module) -> list[Site]:
        sites = super().targets(model)
        problems = [
            Problem(
                f"method.k: `{site.name}` [{outputs}, {inputs}] cannot be cut into {self.k} x {self.k} blocks",
                "take a `k` that divides both, or leave the module out with `exclude_modules`",
            )
            for site in sites
            for inputs, outputs in [hosts.features(site.module)]
            if inputs % self.k or outputs % self.k
        ]
        if problems:
            raise AdapterError.of(problems)
        return sites

    def adapter(self, site: Site) -> Adapter:
        scale = self.alpha / (self.r + self.hybrid_r)
        return GraLoRALinear(site.module, self.k, self.r, self.hybrid_r, scale, self.dropout, self.bias != "none")

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        placed = self.placed(adapters, GraLoRALinear)
        return (
            GRALORA
            | placed
            | {
                "r": self.r,
                "gralora_k": self.k,
                "hybrid_r": self.hybrid_r,
                "alpha": self.alpha,
                "gralora_dropout": self.dropout,
                "bias": self.bias,
                "fan_in_fan_out": hosts.any_conv1d(adapters[name].host for name in placed["target_modules"]),
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> GraLoRA:
        read = Reader(config, place)
        read.supported(GRALORA, set(GRALORA))
        sizes = read.sites(shapes, A, "GraLoRA")
        r, k = read.count("r", GRALORA["r"]), read.count("gralora_k", GRALORA["gralora_k"])
        hybrid_r = read.count("hybrid_r", GRALORA["hybrid_r"], least=0)
        alpha = read.number("alpha", GRALORA["alpha"])
        dropout = read.number("gralora_dropout", GRALORA["gralora_dropout"], most=1)
        bias, saved = read.choice("bias", ("none", "all", "gralora_only")), read.saved(shapes)
        if r % k:
            read.wrong("gralora_k", f"{k} does not divide the rank {r}")
        read.done()
        for name, shape in sizes.items():
            if len(shape) != 3 or (shape[0], shape[2]) != (k, r):
                read.wrong("r", f"{quoted(name)} has an A of {list(shape)}, the config says [{k}, inputs / {k}, {r}]")
        read.done()
        return cls(
            r=r,
            k=k,
            hybrid_r=hybrid_r,
            alpha=alpha,
            dropout=dropout,
            bias=bias,  # type: ignore[arg-type]
            target_modules=sorted(sizes),
            modules_to_save=saved,
        )


A = ".gralora_A"

GRALORA: dict[str, Any] = {
    "alpha": 64,
    "bias": "none",
    "fan_in_fan_out": False,
    "gralora_dropout": 0.0,
    "gralora_k": 2,
    "hybrid_r": 0,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "r": 32,
    "target_modules": None,
}
"""GraloraConfig's own keys with its defaults."""
