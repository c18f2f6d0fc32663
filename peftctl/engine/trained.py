"""Parts of the base that are trained whole: an adapter with its own copy, so that the base stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Stack
from peftctl.errors import AdapterError


class Trained(Adapter):
    """A float32 copy of its host that runs instead of it, in the dtype of the input (HF PEFT: modules_to_save)."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        if any(hosts.is_quantised(module) for module in host.modules()):
            raise AdapterError(
                f"method.modules_to_save: a {type(host).__name__} stored in 4 or 8 bits cannot be trained",
                "leave it out, or train it with `quantization: none`",
            )
        self.copy = pristine(host).float().requires_grad_(True)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = (x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        dtype = next(given, next(self.host.parameters()).dtype)
        state = {name: p.to(dtype) for name, p in self.copy.named_parameters()}
        return functional_call(self.copy, state, args, kwargs)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        return self.copy.get_parameter(name).detach().to(value)

    def peft_key(self, site: str, leaf: str) -> str:
        return super().peft_key(site, leaf.removeprefix("copy."))


class Bias(Adapter):
    """A float32 copy of its host's bias [out], for a host that adds it at the end of its forward."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.bias = own_bias(host)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return rebiased(base(*args, **kwargs), self.host, self.bias)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        return value if name != "bias" or self.bias is None else self.bias.detach().to(value)


def own_bias(host: nn.Module) -> nn.Parameter | None:
    """A float32 copy of the bias of `host` to train; zeros where the model is a skeleton without weights."""
    bias = hosts.bias(host)
    if bias is None:
        return None
    return nn.Parameter(torch.zeros(bias.shape) if bias.is_meta else bias.detach().float().clone())


def rebiased(y: Tensor, host: nn.Module, bias: Tensor | None) -> Tensor:
    """`y` with the bias of `host` replaced by `bias`."""
    old = hosts.bias(host)
    return y if bias is None or old is None else y + (bias - old).to(y.dtype)


def pristine(host: nn.Module) -> nn.Module:
    """A deep copy of `host` without the adapters that others have put around it."""
    copy = deepcopy(host)
    for module in copy.modules():
        if isinstance(module._modules.get("adapters"), Stack):
            del module.adapters, module.forward
    return copy.to_empty(device="cpu") if any(p.is_meta for p in copy.parameters()) else copy
