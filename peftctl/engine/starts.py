"""How low-rank updates start, where that is not with a random A and B = 0; W [out, in], A [r, in], B [out, r].

    gaussian    A ~ N(0, 1 / r^2), B = 0
    orthogonal  A and B not zero, B A = 0: they span odd and even rows of one orthogonal matrix
    pissa       s B A = the best approximation of W by rank r         (Meng et al. 2024, arXiv:2404.02948, eq. 2-4)
    olora       B A = the first r terms of W = Q R                    (Büyükakyüz 2024, arXiv:2406.01775)
    loftq       s B A = the best approximation of W - deq(quant(W))   (Li et al. 2023, arXiv:2310.08659, one iteration)
    eva         A = the main directions of the inputs, B = 0          (Paischer et al. 2024, arXiv:2410.07170)

The base stays as it is: pissa and olora subtract their start instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.attach import adapters_of
from peftctl.engine.base_files import BaseFiles
from peftctl.engine.inputs import second_moments
from peftctl.engine.low_rank import LoRAEmbedding, LoRAFromStart, LoRALinear, LowRank
from peftctl.engine.sample import Sample
from peftctl.errors import AdapterError, Problem

Start = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
Pair = tuple[Tensor, Tensor]

FROM_START = ("pissa", "olora")
"""Starts that are not zero and are subtracted again: their adapters are `LoRAFromStart`."""


@torch.no_grad()
def start(model: nn.Module, name: str, how: Start, sample: Sample | None) -> None:
    """Let the low-rank adapters called `name` start as `how` says. Raises AdapterError, with all that cannot.

    Only looks at `model`. Nothing happens on a skeleton without weights.
    """
    adapters = {site: a for site, a in adapters_of(model, name).items() if isinstance(a, LowRank)}
    if any(parameter.is_meta for a in adapters.values() for parameter in a.host.parameters()):
        return
    refuse(adapters, how)
    if how == "eva":
        along_inputs(model, adapters, sample)
        return
    files = BaseFiles(model, sample) if how == "loftq" else None
    for site, adapter in adapters.items():
        rank, (A, B) = adapter.rank, adapter.factors()
        if how == "gaussian":
            if not isinstance(adapter, LoRAEmbedding):  # there, as in HF PEFT, B is already drawn and A zero
                adapter.start_with(torch.randn(A.shape) / rank, torch.zeros(B.shape))
        elif how == "orthogonal":
            adapter.start_with(*crossed(A.shape[1], len(B), rank))
        else:
            held = hosts.weight(adapter.host).float()
            matrix = files.weight(site, adapter.host).to(held) - held if files else held
            adapter.start_with(*(first_of_qr(matrix, rank) if how == "olora" else nearest(matrix, rank, adapter.scale)))


def along_inputs(model: nn.Module, adapters: Mapping[str, LowRank], sample: Sample | None) -> None:
    """Start with the main directions of what goes into the hosts, and B = 0."""
    if sample is None:
        hint = "`attach(model, method, sample=...)`, or another start"
        raise AdapterError("method.init_weights: `eva` needs rows to look at", hint)
    for site, moment in second_moments(model, {site: a.host for site, a in adapters.items()}, sample):
        adapter = adapters[site]
        adapter.start_with(main_directions(moment, adapter.rank), torch.zeros(adapter.factors()[1].shape))


def refuse(adapters: Mapping[str, LowRank], how: Start) -> None:
    """Raise AdapterError for the adapters that cannot start this way."""
    form = LowRank if how == "gaussian" else LoRAFromStart if how in FROM_START else LoRALinear
    problems = []
    for site, adapter in adapters.items():
        place, rank, (A, B) = f"method.init_weights: `{how}`: `{site}`", adapter.rank, adapter.factors()
        width, out = A.shape[1], len(B)
        if not isinstance(adapter, form):
            what = f"{type(adapter.host).__name__} under a {type(adapter).__name__}"
            problems.append(Problem(f"{place} is a {what}, for which there is no such start", "leave it out"))
        elif how == "orthogonal" and rank % 2:
            problems.append(Problem(f"{place} has rank {rank}", "choose an even `r`"))
        elif how not in ("gaussian", "orthogonal") and rank > (width if how == "eva" else min(width, out)):
            text = f"{place} is {out} by {width}, so it has no {rank} directions to start from"
            problems.append(Problem(text, "choose a smaller `r`, or give it one in `rank_pattern`"))
        elif how == "loftq" and not hosts.is_quantised(adapter.host):
            text = f"{place} is not quantised, and that is what it makes up for"
            problems.append(Problem(text, "set `quantization: nf4`"))
    if problems:
        raise AdapterError.of(problems)


def nearest(matrix: Tensor, rank: int, scale: float) -> Pair:
    """A and B with scale B A = the best approximation of `matrix` by `rank`, each with half of the singular values."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    root, sign = (S[:rank] / scale).sqrt(), signs(V[:rank])
    return (sign * root)[:, None] * V[:rank], U[:, :rank] * (sign * root)


def first_of_qr(matrix: Tensor, rank: int) -> Pair:
    """A and B with B A = the first `rank` columns of Q times the first rows of R, of `matrix` = Q R."""
    Q, R = torch.linalg.qr(matrix)
    return R[:rank], Q[:, :rank]


def crossed(width: int, out: int, rank: int) -> Pair:
    """A and B, not zero, with B A = 0: rows of A and columns of B lie in spans that are orthogonal to each other."""
    Q, _ = torch.linalg.qr(torch.randn(rank, rank))
    half = rank // 2  # the tenth is HF PEFT's: entries of the size that a usual start has
    return (torch.randn(width, half) @ Q[0::2]).T / 10, torch.randn(out, half) @ Q[1::2] / 10


def main_directions(moment: Tensor, rank: int) -> Tensor:
    """The unit vectors [rank, in] along which inputs with the second moment [in, in] are largest, largest first."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors[:, -rank:].flip(1).T
    return signs(vectors)[:, None] * vectors


def signs(vectors: Tensor) -> Tensor:
    """1 or -1 for each row, so that its largest entry becomes positive: a decomposition leaves that open."""
    largest: Tensor = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return largest.sign().flatten()
