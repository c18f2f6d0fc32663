"""A model that runs in float32 whatever memory there is: whole where it fits, else one layer after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.errors import ModelError
from peftctl.exports.dequantise import Dequantised
from peftctl.exports.skeleton import blocks, keys, skeleton, tensors, untie
from peftctl.exports.weights import Weights
from peftctl.models import base as models
from peftctl.models.head import CAUSAL, Head, atop

SPARE = 0.7
"""Share of the free memory that a whole model may take."""


def running(folder: Path, weights: Weights, head: Head = CAUSAL, memory: int | None = None) -> nn.Module:
    """The model in `folder`, on the CPU, in float32, with the tensors that `weights` reads.

    Of a classifier, what the files lack is zeros: an adapter brings it.

    `memory` is what it may take, in bytes; a share of what is free when None. A model that fits is loaded by plain
    transformers. Raises ModelError when it cannot be loaded, or neither fits nor can be read layer by layer.
    """
    if weights.elements * torch.float32.itemsize > (SPARE * free_memory() if memory is None else memory):
        return layered(folder, weights, head)
    base = models.load(models.Model(name_or_path=str(folder), dtype="float32", device="cpu"), head)
    network: nn.Module = base.model
    for name in base.new:
        for parameter in network.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    if isinstance(weights, Dequantised):
        found = tensors(network)
        with torch.no_grad():
            for name, key in keys(network, weights).items():
                if key in weights.linears:
                    found[name].copy_(weights.read(key))
    return network


def layered(folder: Path, weights: Weights, head: Head = CAUSAL) -> nn.Module:
    """The model with its embeddings and its head in memory, and every layer only while it runs."""
    model = skeleton(folder, weights.place, head)
    untie(model, weights)
    where, known = keys(model, weights), tensors(model)
    by_tensor = {id(known[name]): key for name, key in where.items()}  # a tied one is there under another's name
    origin = {name: where.get(name, by_tensor.get(id(tensor))) for name, tensor in known.items()}
    for name in [name for name in known if head.classifies and atop(name, str(model.base_model_prefix))]:
        key = origin[name]
        if key is None or weights.stored[key].shape != tuple(known[name].shape):
            owner, _, leaf = name.rpartition(".")
            put(model.get_submodule(owner), leaf, torch.zeros(known[name].shape))
            del origin[name]
    if lacking := sorted(name for name, key in origin.items() if key is None):
        raise ModelError(
            f"{weights.place}: does not fit the memory, and cannot be read layer by layer: "
            f"`{lacking[0]}` is not in its files under this name",
            "free some memory, or use a larger machine",
        )
    names = {id(module): name for name, module in model.named_modules()}
    layers = {names[id(block)]: Layer(weights) for block in blocks(model)}
    rest = Layer(weights)
    for name, key in origin.items():
        layer = next((layer for prefix, layer in layers.items() if name.startswith(prefix + ".")), rest)
        site, _, leaf = name.rpartition(".")
        layer.slots.append((model.get_submodule(site), leaf, str(key)))
    rest.fill()
    for block, layer in zip(blocks(model), layers.values(), strict=True):
        block.register_forward_pre_hook(layer.fill)
        block.register_forward_hook(layer.empty)
    return model


class Layer:
    """The tensors of a part of a model, which come from `weights` and go again."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.slots: list[tuple[nn.Module, str, str]] = []
        """Owner, name in it, name in the files."""

    def fill(self, *_: Any) -> None:
        """Read all of them, each once."""
        read: dict[str, Tensor] = {}
        for owner, leaf, key in self.slots:
            if key not in read:
                value = self.weights.read(key)
                read[key] = value.float() if value.is_floating_point() else value
            put(owner, leaf, read[key])

    def empty(self, *_: Any) -> None:
        """Forget them."""
        for owner, leaf, _key in self.slots:
            put(owner, leaf, torch.empty_like(getattr(owner, leaf), device="meta"))


def put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Give `owner` another tensor for its parameter or buffer `leaf`, of whatever device."""
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def free_memory() -> int:
    """Bytes of memory that this process may still take: of the machine, or of its container where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or no limit
        return free
    return min(free, limit - int(psutil.Process().memory_info().rss))
