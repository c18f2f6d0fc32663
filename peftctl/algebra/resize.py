"""Another rank for a LoRA: higher, the same function with room to learn; lower, the best approximation that fits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peftctl.algebra.factors import Cut, energy, reduced
from peftctl.algebra.lora_folder import EMBEDDING, LoRAFolder, Update, described


def resized(adapter: LoRAFolder, r: int, seed: int = 0) -> tuple[LoRAFolder, dict[str, Any]]:
    """`adapter` with rank `r` at every site, its scales unchanged, and a report of the energy that each site keeps.

    New ranks start as a fresh LoRA does, one factor drawn from `seed` and the other zero: nothing changes before they
    are trained. Fewer ranks are the best approximation of each update.
    """
    generator = torch.Generator().manual_seed(seed)
    updates, cuts = {}, {}
    for site, update in sorted(adapter.updates.items()):
        if r < update.rank:
            updates[site], cuts[site] = shrunk(update, r)
        else:
            updates[site] = grown(update, r, generator)
    return replace(adapter, config=described(adapter.config, updates), updates=updates), reported(updates, cuts)


def grown(update: Update, r: int, generator: torch.Generator) -> Update:
    """The same update with rank `r`; the ranks that it has keep their bits."""
    more, (out, inputs) = r - update.rank, update.shape
    A, B = torch.zeros(more, inputs), torch.zeros(out, more)
    if update.leaves == EMBEDDING:  # its A is the one that starts at zero: a token that is not met stays as it was
        B = torch.randn(out, more, generator=generator)
    else:
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform with a = sqrt(5), the start of LoRA's A
        A = (2 * torch.rand(more, inputs, generator=generator) - 1) * bound
    return replace(update, A=torch.cat([update.A, A]), B=torch.cat([update.B, B], dim=1))


def shrunk(update: Update, r: int) -> tuple[Update, Cut]:
    """The best approximation of rank `r`, at the same scale."""
    cut = reduced(update.factors(), r)
    A, B = padded(cut.factors.A, cut.factors.B, r)
    root = math.sqrt(update.scale) or 1.0  # a scale of zero, as a stranger's alpha may be, stays one
    return replace(update, A=A / root, B=B / root), cut


def padded(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Factors with ranks of zeros up to `r`, where a matrix has no more of its own."""
    more = r - len(A)
    return torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), more)], dim=1)


def reported(updates: dict[str, Update], cuts: dict[str, Cut]) -> dict[str, Any]:
    """Ranks, and the share of the squared norm that is kept: at each site, and of all updates together.

    A site that is in no cut keeps everything.
    """
    sites = [
        {"site": site, "rank": update.rank, "energy": cuts[site].energy if site in cuts else 1.0}
        for site, update in sorted(updates.items())
    ]
    total = sum(cuts[site].total if site in cuts else update.factors().norm() ** 2 for site, update in updates.items())
    lost = sum(cut.total - cut.kept for cut in cuts.values())
    return {"energy": energy(total - lost, total), "sites": sites}
