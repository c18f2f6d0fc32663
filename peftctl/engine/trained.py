"""Parts of the base that are trained whole: an adapter with its own copy, so that the base stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Stack
from peftctl.errors import AdapterError

CACHES = ("past_key_values", "layer_past", "use_cache")
"""Arguments that a block goes without while it is recomputed, as in transformers: it would write to a cache twice."""


class Trained(Adapter):
    """A float32 copy of its host that runs instead of it, in the dtype of the input (HF PEFT: modules_to_save)."""

    replaces = True

    def __init__(self, host: nn.Module, place: str = "method.modules_to_save") -> None:
        super().__init__()
        if any(hosts.is_quantised(module) for module in host.modules()):
            raise AdapterError(
                f"{place}: a {type(host).__name__} stored in 4 or 8 bits cannot be trained",
                "leave it out, or train it with `quantization: none`",
            )
        self.copy = pristine(host).float().requires_grad_(True)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        recomputing = self.recomputing()
        if not (recomputing and self.training):
            return self.run(*args, **kwargs)
        kwargs |= {key: None for key in CACHES if key in kwargs}
        checkpoint: Any = recomputing[0]._gradient_checkpointing_func
        return checkpoint(partial(self.run, **kwargs), *args)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's forward, with its weights in the dtype of the input; recomputed as a whole or not at all.

        Blocks inside that recomputed themselves would do it when their weights are in float32 again.
        """
        given = (x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        dtype = next(given, next(self.host.parameters()).dtype)
        state = {name: p.to(dtype) for name, p in self.copy.named_parameters()}
        recomputing = self.recomputing()
        for block in recomputing:
            block.gradient_checkpointing = False
        try:
            return functional_call(self.copy, state, args, kwargs)
        finally:
            for block in recomputing:
                block.gradient_checkpointing = True

    def recomputing(self) -> list[Any]:
        """The blocks inside that transformers has told to recompute their activations in the backward pass."""
        return [module for module in self.copy.modules() if getattr(module, "gradient_checkpointing", False)]

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        return self.copy.get_parameter(name).detach().to(value)

    def peft_key(self, site: str, leaf: str) -> str:
        return super().peft_key(site, leaf.removeprefix("copy."))


class Rebiased(Adapter):
    """An adapter that may also train the bias [out] of its host: a float32 copy that takes its place."""

    def __init__(self, host: nn.Module, bias: bool) -> None:
        super().__init__()
        self.bias = own_bias(host) if bias else None

    def rebiased(self, y: Tensor) -> Tensor:
        """`y`, which the host computed, with the own bias instead of the host's."""
        old = hosts.bias(self.host)
        if self.bias is None or old is None:
            return y
        change = (self.bias - old).to(y.dtype)
        return y + change.reshape(*change.shape, *(1,) * hosts.behind_channels(self.host, y))

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        return value if name != "bias" or self.bias is None else self.bias.detach().to(value)

    def peft_key(self, site: str, leaf: str) -> str:
        return super().peft_key(site, "base_layer.bias" if leaf == "bias" else leaf)


class Bias(Rebiased):
    """A float32 copy of its host's bias [out] and nothing else, for a host that adds it at the end of its forward."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host, bias=True)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.rebiased(base(*args, **kwargs))

    def peft_key(self, site: str, leaf: str) -> str:
        return Adapter.peft_key(self, site, leaf)  # HF PEFT wraps nothing here


def own_bias(host: nn.Module) -> nn.Parameter | None:
    """A float32 copy of the bias of `host` to train; zeros where the model is a skeleton without weights."""
    bias = hosts.bias(host)
    if bias is None:
        return None
    return nn.Parameter(torch.zeros(bias.shape) if bias.is_meta else bias.detach().float().clone())


def pristine(host: nn.Module) -> nn.Module:
    """A deep copy of `host` without the adapters and hooks that others have put on it.

    Free under `torch.device("meta")`.
    """
    planning = torch.get_default_device().type == "meta"
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in host.parameters() if planning}
    copy = deepcopy(host, empty)
    for module in copy.modules():
        if isinstance(module._modules.get("adapters"), Stack):
            del module.adapters, module.forward
        module._forward_pre_hooks.clear()  # those of the host run around it already
        module._forward_hooks.clear()
    if planning or not any(p.is_meta for p in copy.parameters()):
        return copy
    return materialised(copy)


def materialised(skeleton: nn.Module) -> nn.Module:
    """`skeleton` with parameters of zeros where it has none but their shapes; its buffers stay as they are."""
    made = {id(p): nn.Parameter(torch.zeros(p.shape, device="cpu")) for p in skeleton.parameters() if p.is_meta}
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = made[id(parameter)]
    return skeleton
