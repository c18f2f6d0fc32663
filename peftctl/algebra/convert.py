"""A LoRA out of an adapter of another method: the best approximation of what that changes in each weight.

U = merged(W) - W, for one weight after the other, so that no more than one is in memory. Where the update does not
depend on the weight it is had from a W of zeros, without the rounding of a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.algebra.factors import approximated
from peftctl.algebra.lora_folder import EMBEDDING, LINEAR, LoRAFolder, Update, described
from peftctl.algebra.resize import reported
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.attach import adapters_of, methods
from peftctl.engine.method import Method, name_of
from peftctl.engine.peft_config import COMMON, read_config
from peftctl.engine.tensor_file import PREFIX
from peftctl.engine.token_rows import TokenRows
from peftctl.engine.trained import Bias, Trained
from peftctl.errors import AdapterError, NotMergeable, Problem
from peftctl.exports.skeleton import keys, skeleton
from peftctl.exports.weights import Weights
from peftctl.methods import load
from peftctl.methods.lora import LoRA
from peftctl.models.adapted import head_of

NAME = "default"
CARRIED = (Trained, Bias, TokenRows)
"""Adapters that LoRA folders have too."""


@torch.no_grad()
def converted(
    folder: Path, base: Path, r: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[LoRAFolder, dict[str, Any]]:
    """The adapter in `folder`, trained on the model in the folder `base`, as a LoRA of rank `r`; and what it keeps.

    Raises NotMergeable, with every reason, for an adapter that is more than an update of linears and embeddings;
    AdapterError for a damaged one, one of another base, or a LoRA; ModelError for a base that cannot be read.
    """
    model = skeleton(base, str(base), head_of(folder, base))
    load(model, folder, NAME)
    method = methods(model)[NAME]
    if type(method) is LoRA:
        raise AdapterError(f"{folder}: a LoRA already", "`peftctl adapters resize` changes its rank")
    adapters = adapters_of(model, NAME)
    refuse_others(folder, method, adapters)
    weights = Weights(base, str(base))
    stored = keys(model, weights)
    others = {
        adapter.peft_key(site, leaf).removeprefix(PREFIX): tensor.detach()
        for site, adapter in adapters.items()
        if isinstance(adapter, CARRIED)
        for leaf, tensor in adapter.exported().items()
    }
    own = {site: adapter for site, adapter in adapters.items() if not isinstance(adapter, CARRIED)}
    updates, cuts = {}, {}
    for number, (site, adapter) in enumerate(sorted(own.items())):
        progress(number, len(own))
        cuts[site] = approximated(dense(adapter, site, stored, weights), r)
        leaves = EMBEDDING if isinstance(adapter.host, nn.Embedding) else LINEAR
        updates[site] = Update(cuts[site].factors.A, cuts[site].factors.B, leaves=leaves)
    progress(len(own), len(own))
    bias, biases = biases_of(own, stored, weights)
    config = read_config(folder)
    result = described(
        {key: config[key] for key in COMMON if key in config}
        | {"fan_in_fan_out": hosts.any_conv1d(adapter.host for adapter in own.values())},
        updates,
        bias="all" if any(isinstance(adapter, Bias) for adapter in adapters.values()) else bias,
        modules_to_save=sorted(getattr(method, "modules_to_save", [])) or None,
        trainable_token_indices=getattr(method, "trainable_token_indices", None),
    )
    return LoRAFolder(folder, result, updates, others | biases), reported(updates, cuts)


def refuse_others(folder: Path, method: Method, adapters: Mapping[str, Adapter]) -> None:
    """Raise NotMergeable when an adapter is no update of a linear or an embedding."""
    own = [adapter for adapter in adapters.values() if not isinstance(adapter, CARRIED)]
    if not own or not all(is_update(adapter) for adapter in own):
        text = f"{folder}: `{name_of(method)}` is no update of linears and embeddings, so no LoRA can stand for it"
        raise NotMergeable(text, f"`peftctl methods {name_of(method)}` says what it is")


def is_update(adapter: Adapter) -> bool:
    """Whether `adapter` stands around a linear or an embedding, and changes its weight."""
    return hosts.kind(adapter.host) is not None and type(adapter).merged is not Adapter.merged


def dense(adapter: Adapter, site: str, stored: Mapping[str, str], weights: Weights) -> Tensor:
    """U [out, in]: what `adapter` adds to the weight of its host."""
    before = torch.zeros(adapter.host.get_parameter("weight").shape)
    if not adapter.scalable:
        before = value(f"{site}.weight", stored, weights)
    try:
        return hosts.stored(adapter.host, adapter.merged(before, "weight") - before)
    except NotMergeable as error:
        raise NotMergeable.of([Problem(f"`{site}`: {text}", hint) for text, hint in error.problems]) from None


def biases_of(
    adapters: Mapping[str, Adapter], stored: Mapping[str, str], weights: Weights
) -> tuple[str, dict[str, Tensor]]:
    """LoRA's `bias`, and the biases on disk: of every adapted host when an adapter changes that of one, else none."""
    old, new = {}, {}
    for site, adapter in adapters.items():
        if hosts.bias(adapter.host) is not None:
            name = f"{site}.base_layer.bias"
            old[name] = value(f"{site}.bias", stored, weights)
            new[name] = adapter.merged(old[name], "bias")
    changes = any(not torch.equal(old[name], new[name]) for name in old)
    return ("lora_only", new) if changes else ("none", {})


def value(name: str, stored: Mapping[str, str], weights: Weights) -> Tensor:
    """The parameter `name` of the base in float32. Raises AdapterError when its files do not have it by this name."""
    if name not in stored:
        hint = "load the base with transformers once and `save_pretrained` it, then give that folder"
        raise AdapterError(f"{weights.place}: `{name}` is not in the files under this name", hint)
    return weights.read(stored[name]).float()
