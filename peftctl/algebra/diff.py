"""How far apart two LoRAs are, exactly and from their factors alone."""

from __future__ import annotations

import math
from typing import Any

import torch

from peftctl.algebra.factors import Factors, inner, stacked
from peftctl.algebra.lora_folder import LoRAFolder
from peftctl.algebra.settings import settings
from peftctl.engine.disk import method_in
from peftctl.errors import AdapterError, Problem


def difference(first: LoRAFolder, second: LoRAFolder) -> dict[str, Any]:
    """Base, settings and sites of both, and at each shared site ||U - V|| / ||U|| and the cosine of U and V.

    `distance` and `cosine` are None where an update is zero. The overall ones take a site that only one of them has as
    zero in the other. Raises AdapterError for sites of different sizes: adapters of different bases.
    """
    mine, theirs = first.updates, second.updates
    shared = sorted(mine.keys() & theirs.keys())
    problems = [
        Problem(f"{second.place}: `{site}` is {list(theirs[site].shape)}, in {first.place} {list(mine[site].shape)}")
        for site in shared
        if mine[site].shape != theirs[site].shape
    ]
    if problems:
        raise AdapterError.of(problems)
    sites, across, apart = [], 0.0, 0.0
    for site in shared:
        a, b = mine[site].factors(), theirs[site].factors()
        gap, dot = stacked([(1.0, a), (-1.0, b)]).norm(), inner(a, b)
        across, apart = across + dot, apart + gap**2
        sites.append({"site": site, **compared(gap, dot, a.norm(), b.norm())})
    alone = [[a.updates[site].factors() for site in sorted(a.updates.keys() - set(shared))] for a in (first, second)]
    apart += sum(squared(part) for part in alone)
    whole = [math.sqrt(squared([update.factors() for update in a.updates.values()])) for a in (first, second)]
    ours, other = (settings(method_in(adapter.place)) for adapter in (first, second))
    return {
        "base": {"same": first.base == second.base, "names": [first.base, second.base]},
        "settings": {key: [ours[key], other[key]] for key in sorted(ours) if ours[key] != other[key]},
        "overall": compared(math.sqrt(apart), across, *whole),
        "only_in_first": sorted(mine.keys() - theirs.keys()),
        "only_in_second": sorted(theirs.keys() - mine.keys()),
        "others_differ": others_differ(first, second),
        "sites": sites,
    }


def compared(gap: float, dot: float, norm: float, other: float) -> dict[str, Any]:
    """Two updates in figures."""
    return {
        "distance": gap / norm if norm else None,
        "cosine": max(-1.0, min(1.0, dot / (norm * other))) if norm and other else None,
        "norms": [norm, other],
    }


def squared(updates: list[Factors]) -> float:
    """Sum of the squares of all their entries."""
    return sum(update.norm() ** 2 for update in updates)


def others_differ(first: LoRAFolder, second: LoRAFolder) -> list[str]:
    """Names of the tensors beside the updates that are not the same in both: biases, modules trained whole."""
    names = first.others.keys() | second.others.keys()
    both = first.others.keys() & second.others.keys()
    return sorted(n for n in names if n not in both or not torch.equal(first.others[n], second.others[n]))
