"""The weights that a quantised run was trained on: quantised as bitsandbytes does it, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.anatomy import modules, output_head, under
from peftctl.exports.weights import Weights
from peftctl.models.base import Model
from peftctl.models.device import choose_device, choose_dtype
from peftctl.models.head import CAUSAL, Head, atop
from peftctl.models.quantization import bitsandbytes


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """How the base of a run was quantised."""

    kind: Literal["nf4", "fp4", "int8"]
    """As in the recipe's `model.quantization`."""

    double: bool
    """4 bit only: whether the scales are quantised as well."""

    dtype: torch.dtype
    """Of the weights before they were quantised, and of the run's computation."""

    @classmethod
    def of(cls, model: Model) -> Self | None:
        """What a recipe's `model` block says, on this machine; None when it does not quantise."""
        if model.quantization == "none":
            return None
        dtype = choose_dtype(model.dtype, choose_device(model.device))
        return cls(kind=model.quantization, double=model.double_quantization, dtype=dtype)

    def block(self, folder: Path) -> Model:
        """The `model` block that loads the base in `folder` this way."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Model(
            name_or_path=str(folder),
            dtype=dtype,  # type: ignore[arg-type]
            quantization=self.kind,
            double_quantization=self.double,
        )


class Dequantised(Weights):
    """Like `Weights`, but linears that a quantised load would quantise come back from being quantised.

    `linears` are these, by the name of their weight in the files.
    """

    def __init__(self, folder: Path, place: str, quantised: Quantised, linears: dict[str, nn.Module]) -> None:
        super().__init__(folder, place)
        self.quantised, self.linears = quantised, linears

    def read(self, name: str) -> Tensor:
        value = super().read(name)
        if name in self.linears:
            host = self.linears[name]
            return hosts.stored(host, there_and_back(hosts.stored(host, value), self.quantised))
        return value


def there_and_back(matrix: Tensor, quantised: Quantised) -> Tensor:
    """A weight [out, in] after bitsandbytes has quantised and dequantised it."""
    bitsandbytes()
    from bitsandbytes import functional
    from bitsandbytes import nn as layers

    matrix = matrix.to(quantised.dtype)
    if quantised.kind == "int8":
        kept = layers.Int8Params(matrix, requires_grad=False, has_fp16_weights=False).to("cpu")
        return cast(Tensor, functional.int8_vectorwise_dequant(kept.data, kept.SCB))
    kept = layers.Params4bit(
        matrix.contiguous(), requires_grad=False, compress_statistics=quantised.double, quant_type=quantised.kind
    ).to("cpu")
    return cast(Tensor, functional.dequantize_4bit(kept.data, kept.quant_state))


def linears(model: nn.Module, head: Head = CAUSAL) -> dict[str, nn.Module]:
    """The linears of the skeleton `model` that transformers quantises, by the name of their weight.

    All but the output head or what classifies, what shares its weight, and what the model keeps in float32 (T5's `wo`).
    """
    last, kept = output_head(model), getattr(model, "_keep_in_fp32_modules", None) or ()
    return {
        f"{site}.weight": module
        for site, module in modules(model)
        if hosts.is_linear(module)
        and module is not last
        and not any(under(site, entry) for entry in kept)
        and not (head.classifies and atop(f"{site}.weight", str(model.base_model_prefix)))
    }
