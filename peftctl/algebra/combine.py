"""Several LoRAs of one base as one: their weighted sum, or what TIES and DARE make of it.

linear   U = sum_i w_i U_i exactly, with as many ranks as that needs
cat      the same sum, factors side by side: rank sum_i r_i, A as it was
svd      the best approximation of that sum of a given rank
ties     Yadav et al. 2023, arXiv:2306.01708, sec. 3: of each U_i the largest entries stay; at each entry the sign of
         the larger sum wins; those of that sign are averaged by w. The w count relative to each other.
dare     Yu et al. 2023, arXiv:2311.03099, eq. 1: entries of each U_i dropped at random, the rest divided by the share
         that stays; then the weighted sum

U_i = s_i B_i A_i [out, in]. HF PEFT's `linear` adds the A's and the B's, which is another function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from peftctl.algebra.dense import dare, ties
from peftctl.algebra.factors import Cut, Factors, approximated, reduced, stacked
from peftctl.algebra.lora_folder import LoRAFolder, Update, described
from peftctl.algebra.resize import reported
from peftctl.config.quote import quoted
from peftctl.errors import AdapterError, Problem

How = Literal["linear", "cat", "svd", "ties", "dare"]
Term = tuple[float, Update]
"""A weight, and the update of one site by one adapter."""

AGREE = ("bias", "trainable_token_indices", "loftq_config")
"""Settings that decide which tensors a folder has, and which base it fits."""


def combined(
    adapters: Sequence[LoRAFolder],
    weights: Sequence[float],
    how: How = "linear",
    *,
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LoRAFolder, dict[str, Any]]:
    """One LoRA, all its scales one, and a report of the energy that each site keeps.

    An adapter that lacks a site adds nothing there. What is trained whole beside the updates is averaged by weight.

    Args:
        r: rank of the result, for all but `linear` and `cat`; by default the highest among the adapters.
        density: share of the entries that `ties` and `dare` leave.
        seed: of the entries that `dare` drops.
        progress: sites done, and to do.

    Raises:
        AdapterError: adapters that do not go together, with every reason.
    """
    refuse_unlike(adapters, weights)
    generator = torch.Generator().manual_seed(seed)
    sites = sorted(set().union(*(adapter.updates for adapter in adapters)))
    rank = r or max(update.rank for adapter in adapters for update in adapter.updates.values())
    updates, cuts = {}, {}
    for number, site in enumerate(sites):
        progress(number, len(sites))
        terms = [(w, a.updates[site]) for w, a in zip(weights, adapters, strict=True) if site in a.updates]
        cuts[site] = COMBINE[how](terms, rank, density, generator)
        updates[site] = replace(terms[0][1], A=cuts[site].factors.A, B=cuts[site].factors.B, scale=1.0)
    progress(len(sites), len(sites))
    first = adapters[0]
    result = replace(
        first, config=described(first.config, updates), updates=updates, others=averaged(adapters, weights)
    )
    return result, reported(updates, cuts)


def summed(terms: Sequence[Term]) -> Factors:
    """The weighted sum, exactly."""
    return stacked([(weight, update.factors()) for weight, update in terms])


def side_by_side(terms: Sequence[Term]) -> Cut:
    """The weighted sum as it stands."""
    factors = summed(terms)
    energy = factors.norm() ** 2
    return Cut(factors, energy, energy)


COMBINE: Mapping[How, Callable[[Sequence[Term], int, float, torch.Generator], Cut]] = {
    "linear": lambda terms, r, density, generator: reduced(summed(terms)),
    "cat": lambda terms, r, density, generator: side_by_side(terms),
    "svd": lambda terms, r, density, generator: reduced(summed(terms), r),
    "ties": lambda terms, r, density, generator: approximated(ties(dense(terms), density), r),
    "dare": lambda terms, r, density, generator: approximated(dare(dense(terms), density, generator), r),
}


def dense(terms: Sequence[Term]) -> list[tuple[float, Callable[[], Tensor]]]:
    """What builds each update [out, in] when it is its turn."""
    return [(weight, lambda update=update: update.scale * (update.B @ update.A)) for weight, update in terms]  # type: ignore[misc]


def averaged(adapters: Sequence[LoRAFolder], weights: Sequence[float]) -> dict[str, Tensor]:
    """What the adapters trained whole, averaged by weight; what is equal in all that have it keeps its bits."""
    total, found = sum(weights), {}
    for name in sorted(set().union(*(adapter.others for adapter in adapters))):
        every = [adapter.others[name] for adapter in adapters if name in adapter.others]
        tensor = every[0]
        if all(torch.equal(tensor, other) for other in every[1:]):
            found[name] = tensor
        else:
            parts = [weight / total * other.double() for weight, other in zip(weights, every, strict=True)]
            found[name] = torch.stack(parts).sum(0).float()
    return found


def refuse_unlike(adapters: Sequence[LoRAFolder], weights: Sequence[float]) -> None:
    """Raise AdapterError, with every reason, for adapters that cannot be one."""
    first, problems = adapters[0], []
    updating = {site: a for a in reversed(adapters) for site in a.updates}  # the first that has it
    holding = {name: a for a in reversed(adapters) for name in a.others}
    for other in adapters[1:]:
        place = str(other.place)
        for site in sorted(other.updates):
            having = updating[site]
            mine, theirs = having.updates[site], other.updates[site]
            if (mine.shape, mine.leaves, mine.kernel) != (theirs.shape, theirs.leaves, theirs.kernel):
                text = f"{place}: `{site}` is {list(theirs.shape)}, in {having.place} {list(mine.shape)}"
                problems.append(Problem(text, "adapters of one base only can be combined"))
        for key in AGREE:
            if (first.config.get(key) or None) != (other.config.get(key) or None):
                said = [quoted(str(adapter.config.get(key))) for adapter in (other, first)]
                problems.append(Problem(f"{place}: {key}: {said[0]}, in {first.place} {said[1]}"))
        hint = "combine adapters that train the same modules whole, or without `modules_to_save`"
        for name in sorted(first.others.keys() ^ other.others.keys()):
            having, lacking = (other, first) if name in other.others else (first, other)
            if not having.is_copy(name):
                problems.append(Problem(f"{lacking.place}: `{name}`, trained whole in another, is missing", hint))
        for name in sorted(other.others):
            having = holding[name]
            if having.others[name].shape != other.others[name].shape:
                problems.append(Problem(f"{place}: `{name}` has another shape than in {having.place}", hint))
            elif having.is_copy(name) and not torch.equal(having.others[name], other.others[name]):
                problems.append(Problem(f"{place}: `{name}` is of another base than in {having.place}"))
    if any(not first.is_copy(name) for name in first.others) and sum(weights) <= 0:
        problems.append(Problem("weights: modules trained whole need weights whose sum is above 0"))
    if problems:
        raise AdapterError.of(problems)
