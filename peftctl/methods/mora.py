"""MoRA: a square matrix instead of two thin ones, for updates of high rank. Jiang et al. 2024, arXiv:2405.12130.

y = W x + decompress(M compress(x)),   m = floor(sqrt((in + out) r))        (section 4)

W [out, in] frozen, M [m, m]: as many parameters as LoRA of rank r, and a rank of up to m. M starts at zero, so training
starts from the base model. x is cut into pieces x_0, x_1, ... of m, the last filled up with the beginning of x; then

sharing    compress(x) = x_0 + x_1 + ...; the result is repeated until it is `out` long        (eq. 6, for large r)
rotation   M acts on each piece by itself, turned by an angle that grows with its number as in RoPE, so that M can tell
           the pieces apart; the results in a row are cut, or repeated, to the length `out`, so that of more inputs than
           outputs the last do not count                                                       (eq. 9, for small r)

Where the paper leaves a choice this is what its authors' code does. Rotation turns pairs, so there m is even.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftctl.config.block import Count, Probability
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Linear
from peftctl.engine.anatomy import Site
from peftctl.engine.method import Targeted, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.update import Update

Compression = Literal["rotation", "sharing"]


class MoRALinear(Update):
    """x [..., in] -> y [..., out]; mora_M [m, m]."""

    def __init__(self, host: nn.Module, rank: int, compression: Compression, dropout: float) -> None:
        super().__init__(host, dropout)
        self.in_features, self.out_features = hosts.features(host)
        self.compression = compression
        size, used = math.isqrt((self.in_features + self.out_features) * rank), self.in_features
        if compression == "rotation":
            size = max(2, size - size % 2)
            used = min(used, self.out_features)  # what the pieces beyond it give would be cut
        self.size, self.pieces = size, -(-used // size)
        self.mora_M = Linear(self.size, self.size, bias=False)
        nn.init.zeros_(self.mora_M.weight)

    def update(self, x: Tensor) -> Tensor:
        pieces = tiled(x, self.pieces * self.size).reshape(*x.shape[:-1], self.pieces, self.size)
        if self.compression == "sharing":
            return tiled(self.mora_M(pieces.sum(-2)), self.out_features)
        return tiled(self.mora_M(turned(pieces)).flatten(-2), self.out_features)

    def matrix(self) -> Tensor:
        M = self.mora_M.weight
        if self.compression == "sharing":
            wide = M.repeat(1, self.pieces)
        else:  # a row of M times a rotation is that row turned backwards
            blocks = turned(M[:, None].expand(-1, self.pieces, -1), -1).transpose(0, 1)
            wide = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        column = torch.arange(wide.shape[1], device=M.device) % self.in_features
        folded = M.new_zeros(len(wide), self.in_features).index_add(1, column, wide)
        return tiled(folded.T, self.out_features).T


def tiled(x: Tensor, length: int) -> Tensor:
    """`x` [..., n] cut to `length`, or repeated until it is that long: [..., length]."""
    if length <= x.shape[-1]:
        return x[..., :length]
    times, rest = divmod(length, x.shape[-1])
    return torch.cat([x] * times + [x[..., :rest]], -1)


def turned(pieces: Tensor, sign: int = 1) -> Tensor:
    """Piece number p of `pieces` [..., p, m] turned by p times RoPE's angles, `sign` -1 backwards."""
    count, size = pieces.shape[-2:]
    half = torch.arange(size // 2, device=pieces.device)
    angle = sign * torch.outer(torch.arange(count, device=pieces.device), 10000 ** (-2 * half / size))
    cos, sin = angle.cos().to(pieces.dtype), angle.sin().to(pieces.dtype)
    a, b = pieces.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@register
@dataclass(frozen=True, kw_only=True)
class MoRA(Targeted):
    """Updates of high rank from a square matrix: for tasks that have to learn facts rather than a format."""

    r: Count = 8
    """Rank of the LoRA that has as many parameters."""
    compression: Compression = "rotation"
    """How the input comes to the size of the matrix: `rotation` keeps its pieces apart, for small `r`; `sharing` adds
    them up, for large `r`. The authors' `mora_type` 6 and 1."""
    dropout: Probability = 0.0
    """Fraction of the adapter's inputs dropped in training."""

    peft_type: ClassVar[str] = "MORA"
    learning_rate: ClassVar[float] = 3e-4  # the authors'
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    paper: ClassVar[str] = "Jiang et al. 2024, arXiv:2405.12130"

    def adapter(self, site: Site) -> Adapter:
        return MoRALinear(site.module, self.r, self.compression, self.dropout)

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return self.placed(adapters, MoRALinear) | {
            "r": self.r,
            "compression": self.compression,
            "mora_dropout": self.dropout,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> MoRA:
        read = Reader(config, place)
        read.supported({}, {"r", "compression", "mora_dropout", "target_modules", "modules_to_save"})
        sites = read.sites(shapes, LEAF, "MoRA")
        method = cls(
            r=read.count("r", cls.r),
            compression=read.choice("compression", ("rotation", "sharing")),  # type: ignore[arg-type]
            dropout=read.number("mora_dropout", 0.0, most=1),
            target_modules=sorted(sites),
            modules_to_save=read.saved(shapes),
        )
        read.done()
        return method


LEAF = ".mora_M.weight"
