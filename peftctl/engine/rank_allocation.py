"""Ranks by gradient: of a fixed budget of parameters, each site gets as many ranks as the loss asks for there.

For a random A [k, in] with rows of unit variance the gradient of B is s G A^T, a sketch of the weight's gradient
G [out, in]; its squared singular values say what the first, second, ... rank could change about the loss. The budget is
given out one rank at a time to where such a change costs the fewest parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor, nn

from peftctl.engine.attach import adapters_of, attach, detach
from peftctl.engine.low_rank import LowRank
from peftctl.engine.method import Method
from peftctl.engine.sample import Sample

WIDEST = 4
"""Ranks that one site may get, in multiples of the even share."""


PROBE = "probe"


def gradient_ranks(model: nn.Module, probe: Method, sample: Sample, r: int) -> dict[str, int]:
    """Site -> rank for rank `r` on average, on a look at the rows of `sample`.

    `probe` is a LoRA of rank `WIDEST * r` on the sites in question. Random numbers of the caller are left alone.
    """
    with torch.random.fork_rng():
        attach(model, probe, PROBE)
    costs = {
        site: sum(factor.numel() // len(adapter.factors()[0]) for factor in adapter.factors())
        for site, adapter in adapters_of(model, PROBE).items()
        if isinstance(adapter, LowRank)
    }
    try:
        found = gains(model, PROBE, sample)
    finally:
        detach(model, PROBE)
    return allocated(found, costs, r)


def gains(model: nn.Module, name: str, sample: Sample) -> dict[str, Tensor]:
    """Site -> squared singular values [k], falling, of the gradient that the attached probe `name` of rank k sees."""
    probes = {site: a for site, a in adapters_of(model, name).items() if isinstance(a, LowRank)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for probe in probes.values():
            A, B = probe.factors()
            A.copy_(torch.randn(A.shape, generator=generator))
            B.zero_()
    for batch in sample.batches():
        torch.autograd.backward(sample.loss(model, batch))
    return {site: squares(probe) for site, probe in probes.items()}


def squares(probe: LowRank) -> Tensor:
    """The squared singular values of the gradient of B; a single zero where the loss does not reach it."""
    gradient = probe.factors()[1].grad
    return torch.zeros(1) if gradient is None else torch.linalg.svdvals(gradient / probe.scale).square().cpu()


def allocated(gains: Mapping[str, Tensor], costs: Mapping[str, int], r: int) -> dict[str, int]:
    """Site -> rank, from 1 to WIDEST * r, with at most the parameters that rank `r` everywhere has.

    `costs` is the parameters of one rank at a site.
    """
    left = (r - 1) * sum(costs.values())
    ranks = dict.fromkeys(gains, 1)
    queue = [(-float(values[1]) / costs[site], site) for site, values in gains.items() if len(values) > 1]
    heapify(queue)
    while queue:
        _, site = heappop(queue)
        if costs[site] > left:
            continue
        left -= costs[site]
        ranks[site] += 1
        if ranks[site] < min(WIDEST * r, len(gains[site])):
            heappush(queue, (-float(gains[site][ranks[site]]) / costs[site], site))
    return ranks
