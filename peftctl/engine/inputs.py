"""What goes into modules of the base model at the tokens that are trained: sums of x x^T over a sample of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.engine.attach import bare
from peftctl.engine.hosts import device, features
from peftctl.engine.sample import IGNORED, Sample
from peftctl.errors import AdapterError

PASS = 2 << 30
"""Bytes of sums that are gathered in one pass over the sample; a larger model takes several."""


def second_moments(model: nn.Module, sites: Mapping[str, nn.Module], sample: Sample) -> Iterator[tuple[str, Tensor]]:
    """Site -> sum of x x^T [in, in] in float64 over the inputs x [in] that the base model alone gives it.

    Raises AdapterError for a site whose inputs do not belong to one token each, and for a sample without such tokens.
    """
    with bare(model), evaluating(model), torch.no_grad():  # what a first forward tries out is not to be counted
        sample.loss(model, next(iter(sample.batches())))
    for part in parts(sites):
        yield from gathered(model, part, sample).items()


def parts(sites: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The sites in groups whose sums fit into one pass."""
    part: dict[str, nn.Module] = {}
    size = 0
    for site, module in sites.items():
        own = features(module)[0] ** 2 * 8
        if part and size + own > PASS:
            yield part
            part, size = {}, 0
        part[site], size = module, size + own
    if part:
        yield part


@torch.no_grad()
def gathered(model: nn.Module, sites: Mapping[str, nn.Module], sample: Sample) -> dict[str, Tensor]:
    """The sums of one pass."""
    sums = {
        site: torch.zeros(features(module)[0], features(module)[0], dtype=torch.float64, device=exact(module))
        for site, module in sites.items()
    }
    wanted = torch.zeros(0)

    def add(site: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if x.shape[:-1].numel() != wanted.numel():
            text = f"method.init_weights: `eva`: the inputs of `{site}` are not one for each token"
            raise AdapterError(text, "leave it out of the targets")
        x = x.reshape(-1, x.shape[-1])[wanted.to(x.device)].to(sums[site])
        sums[site] += x.T @ x

    hooks = [module.register_forward_pre_hook(partial(add, site)) for site, module in sites.items()]
    try:
        with bare(model), evaluating(model):
            for batch in sample.batches():
                wanted = ((batch["labels"] != IGNORED) & batch["attention_mask"].bool()).flatten()
                sample.loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(bool(total.any()) for total in sums.values()):
        raise AdapterError(
            "method.init_weights: `eva`: the sample has no trained token to look at", "give it more rows"
        )
    return sums


def exact(module: nn.Module) -> torch.device:
    """Where float64 can be had, next to `module` if possible."""
    where = device(module)
    return torch.device("cpu") if where.type == "mps" else where


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside this context, and as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
