"""OFT: turn the inputs of a linear by an orthogonal matrix. Qiu et al. 2023, arXiv:2306.07280.

y = W R^T x,   R = diag(R_1, ..., R_k),   R_i = (I + Q_i)(I - Q_i)^-1,   Q_i = -Q_i^T      (section 3)

W [out, in] frozen; R_i [b, b] orthogonal, k b = in; Q_i [b, b] made of the b (b - 1) / 2 trained numbers above its
diagonal, which start at zero: training starts from the base model. R turns all rows of W together, so that the angles
between them stay. `use_cayley_neumann` (Qiu et al. 2025, arXiv:2506.19847) cuts the inverse off as a series,
R_i = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 with five terms: no system to solve, and nearly orthogonal while Q is small.

Folders are HF PEFT's, whose exact form is (I - Q)(I + Q)^-1, and so it is here. PEFT stands around no Conv1D (GPT-2):
what is trained there loads here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from peftctl.config.block import Count, Positive, Probability
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site
from peftctl.engine.attach import adapters_of
from peftctl.engine.biased import Biased
from peftctl.engine.method import register
from peftctl.engine.peft_config import Reader
from peftctl.engine.trained import Rebiased


class Rotation(Rebiased):
    """x [..., in] -> y [..., out]; a row of oft_R [k, b (b - 1) / 2] is what is above the diagonal of one Q_i.

    With `block_share` there is one row for all blocks.
    """

    def __init__(self, host: nn.Module, method: OFT) -> None:
        super().__init__(host, method.bias != "none")
        in_features, _ = hosts.features(host)
        self.method = method
        self.size = method.size(in_features)
        self.blocks = in_features // self.size
        rows = 1 if method.block_share else self.blocks
        self.oft_R = nn.Parameter(torch.zeros(rows, self.size * (self.size - 1) // 2))

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        change = self.change()
        if self.training and self.method.dropout > 0:
            change = change * (torch.rand(self.blocks, 1, 1, device=change.device) >= self.method.dropout)
        return self.rebiased(base(self.turned(x, change.to(x.dtype)), *args, **kwargs))

    def turned(self, x: Tensor, change: Tensor) -> Tensor:
        """Rows x [..., in] turned: every block of them becomes x_i + x_i change_i."""
        pieces = x.reshape(*x.shape[:-1], self.blocks, self.size)
        return x + torch.einsum("...kb,kbc->...kc", pieces, change.expand(self.blocks, -1, -1)).flatten(-2)

    def change(self) -> Tensor:
        """R_i - I [k or 1, b, b]: in half precision, R itself would round away most of what was learned."""
        entries: Tensor = self.oft_R
        if self.method.coft:  # the gradient passes as it is, or a block on the sphere could never come off it
            entries = entries + (self.constrained() - entries).detach()
        Q = skew(entries, self.size)
        if self.method.use_cayley_neumann:
            return neumann(Q, self.method.num_cayley_neumann_terms)
        exact: Tensor = torch.linalg.solve(torch.eye(self.size, device=Q.device) + Q, -2 * Q, left=False)
        return exact

    def constrained(self) -> Tensor:
        """oft_R with every Q_i that is too large shortened to the largest norm that COFT allows."""
        norm = 2**0.5 * self.oft_R.norm(dim=1, keepdim=True)  # every number stands twice in Q
        most = self.method.eps / len(self.oft_R) ** 0.5
        return torch.where(norm <= most, self.oft_R, self.oft_R * (most / norm))

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name != "weight":
            return super().merged(value, name)
        weight = self.turned(hosts.stored(self.host, value.float()), self.change().mT.to(value.device))
        return hosts.stored(self.host, weight).to(value.dtype)

    def peft_key(self, site: str, leaf: str) -> str:
        return super().peft_key(site, "oft_R.weight" if leaf == "oft_R" else leaf)


def skew(entries: Tensor, size: int) -> Tensor:
    """Q [k, size, size] = -Q^T with `entries` [k, size (size - 1) / 2] above the diagonals, row by row."""
    i, j = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(len(entries), size, size)
    upper[:, i, j] = entries
    return upper - upper.mT


def neumann(Q: Tensor, terms: int) -> Tensor:
    """2 Q + 2 Q^2 + ... + Q^(terms - 1), the last power once; as HF PEFT, 2 Q for two terms, and for three as many as
    for four."""
    highest = 1 if terms == 2 else max(terms, 4) - 1
    power, series = Q, 2 * Q
    for exponent in range(2, highest + 1):
        power = power @ Q
        series = series + (power if exponent == highest else 2 * power)
    return series


@register
@dataclass(frozen=True, kw_only=True)
class OFT(Biased):
    """Rotations of what linears read: they leave the geometry of the weight alone, and so more of what it knows."""

    block_size: Count | None = None
    """Inputs that are turned together, 32 unless `r` is given; where it does not divide the inputs of a linear, the
    nearest size that does."""
    r: Count | None = None
    """Number of blocks in a linear, instead of their size; the nearest number that divides its inputs."""
    dropout: Probability = 0.0
    """Fraction of the blocks that are not turned in a training step. HF PEFT keeps this number and does not use it."""
    coft: bool = False
    """Constrain the rotation: a block's Q keeps a norm of at most eps / sqrt(number of blocks)."""
    eps: Positive = 6e-5
    """How far `coft` lets it turn."""
    block_share: bool = False
    """One rotation for all blocks of a linear."""
    use_cayley_neumann: bool = True
    """Cut the inverse off as a series: faster, and not quite orthogonal."""
    num_cayley_neumann_terms: Annotated[int, Ge(2)] = 5
    """Terms of that series, the identity among them."""
    bias: Literal["none", "all", "oft_only"] = "none"
    """Biases trained beside the rotation: of no module, of all, of the adapted ones."""

    peft_type: ClassVar[str] = "OFT"
    learning_rate: ClassVar[float] = 4e-4
    paper: ClassVar[str] = "Qiu et al. 2023, arXiv:2306.07280"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __post_init__(self) -> None:
        if self.block_size and self.r:
            raise ValueError("block_size and r decide the same; hint: leave one out")

    def size(self, in_features: int) -> int:
        """Size of a block in a linear of so many inputs, by HF PEFT's rule: ties go to the smaller divisor."""
        wanted = self.r or self.block_size or OFT_CONFIG["oft_block_size"]
        small = [n for n in range(1, math.isqrt(in_features) + 1) if in_features % n == 0]
        nearest = min([*small, *(in_features // n for n in small)], key=lambda n: (abs(n - wanted), n))
        return in_features // nearest if self.r else nearest

    def adapter(self, site: Site) -> Adapter:
        return Rotation(site.module, self)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        for adapter in adapters_of(model).values():
            if self.coft and isinstance(adapter, Rotation) and adapter.oft_R.requires_grad:
                adapter.oft_R.copy_(adapter.constrained())

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return (
            OFT_CONFIG
            | self.placed(adapters, Rotation)
            | {
                "r": self.r or 0,
                "oft_block_size": 0 if self.r else self.block_size or OFT_CONFIG["oft_block_size"],
                "module_dropout": self.dropout,
                "coft": self.coft,
                "eps": self.eps,
                "block_share": self.block_share,
                "use_cayley_neumann": self.use_cayley_neumann,
                "num_cayley_neumann_terms": self.num_cayley_neumann_terms,
                "bias": self.bias,
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> OFT:
        read = Reader(config, place)
        read.supported(OFT_CONFIG, set(OFT_CONFIG))
        if "oft_block_size" not in config:
            read.wrong(
                "oft_block_size", "missing: a folder of PEFT before 0.14, whose OFT was another", "train it again"
            )
        r = read.count("r", OFT_CONFIG["r"], least=0)
        size = read.count("oft_block_size", OFT_CONFIG["oft_block_size"], least=0)
        if bool(r) == bool(size):
            read.wrong("r", f"is {r} where `oft_block_size` is {size}; exactly one of them is above 0")
        eps = read.number("eps", OFT_CONFIG["eps"])
        if not eps:
            read.wrong("eps", "expected a number above 0; got `0`")
        targets = sorted(read.sites(shapes, LEAF, "OFT"))
        terms = OFT_CONFIG["num_cayley_neumann_terms"]
        fields: dict[str, Any] = {
            "dropout": read.number("module_dropout", OFT_CONFIG["module_dropout"], most=1),
            "coft": read.flag("coft"),
            "eps": eps,
            "block_share": read.flag("block_share"),
            "use_cayley_neumann": read.flag("use_cayley_neumann", OFT_CONFIG["use_cayley_neumann"]),
            "num_cayley_neumann_terms": read.count("num_cayley_neumann_terms", terms, least=2, most=100),
            "bias": read.choice("bias", ("none", "all", "oft_only")),
            "target_modules": targets,
            "modules_to_save": read.saved(shapes),
        }
        read.done()
        return cls(r=r or None, block_size=size or None, **fields)


LEAF = ".oft_R.weight"

OFT_CONFIG: dict[str, Any] = {
    "bias": "none",
    "block_share": False,
    "coft": False,
    "eps": 6e-5,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "module_dropout": 0.0,
    "modules_to_save": None,
    "num_cayley_neumann_terms": 5,
    "oft_block_size": 32,
    "r": 0,
    "target_modules": None,
    "use_cayley_neumann": True,
}
"""OFTConfig's own keys with its defaults."""
