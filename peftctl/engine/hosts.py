"""Kinds of host: how each stores its weight, seen by everybody else as one matrix [out, in].

    Linear            weight [out, in]      as it is
    Conv1D (GPT-2)    weight [in, out]      transposed
    Embedding         weight [rows, width]  transposed: a linear from one-hot rows to the width
    Linear4bit        NF4 or FP4 blocks     dequantised to read, never written
    Linear8bitLt      int8 rows and scales  dequantised to read, never written

Kinds outside torch are recognised by class name, so that nothing is imported for a model that has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

TRANSPOSED = ("Conv1D", "Embedding")
QUANTISED = ("Linear4bit", "Linear8bitLt")
LINEAR = ("Linear", "Conv1D", *QUANTISED)


def kind(module: nn.Module) -> str | None:
    """The kind of host `module` is, a class name of the table above; None when it is none of them."""
    for cls in type(module).__mro__:
        if cls.__name__ in LINEAR or cls is nn.Embedding:
            return cls.__name__
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear map of its input, in whatever form its weight is kept."""
    return kind(module) in LINEAR


def is_quantised(module: nn.Module) -> bool:
    """Whether the weight of `module` is stored in 4 or 8 bits."""
    return kind(module) in QUANTISED


def any_conv1d(modules: Iterable[nn.Module]) -> bool:
    """Whether one of `modules` is a Conv1D; HF PEFT's configs say so as `fan_in_fan_out`."""
    return any(kind(module) == "Conv1D" for module in modules)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of the linear map that `module` is."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if kind(module) == "Conv1D":
        rows, columns = module.get_parameter("weight").shape
        return rows, columns
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [out, in] in the layout that `module` keeps its weight in, and the other way round."""
    return matrix.T if kind(module) in TRANSPOSED else matrix


def weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of a host, dequantised when it is stored in 4 or 8 bits."""
    name, kept = kind(module), cast(Any, module.get_parameter("weight"))
    if name == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(kept.data, kept.quant_state))
    if name == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = kept.SCB if kept.SCB is not None else cast(Any, module).state.SCB
        return cast(Tensor, int8_vectorwise_dequant(kept.data, scales))
    return stored(module, kept)


def bias(module: nn.Module) -> Tensor | None:
    """The bias [out] that `module` adds at the end of its forward; None when it has none."""
    return module._parameters.get("bias")


def ends_in_bias(module: nn.Module) -> bool:
    """Whether `module` has a bias and adds it at the end of its forward."""
    adding = (nn.LayerNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d)
    return (is_linear(module) or isinstance(module, adding)) and bias(module) is not None


def behind_channels(module: nn.Module, y: Tensor) -> int:
    """How many axes of an output `y` of `module` lie behind the one that its bias belongs to."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return len(module.kernel_size)
    return y.ndim - 2 if isinstance(module, nn.GroupNorm) else 0


def transposed_on_disk(module: nn.Module) -> bool:
    """Whether the base's files keep the weight of `module` as [in, out]: also of a Conv1D that is now in 4 bits."""
    source = getattr(module, "source_cls", type(module))  # what transformers says that it has replaced
    return kind(module) in TRANSPOSED or any(cls.__name__ == "Conv1D" for cls in source.__mro__)


def device(module: nn.Module) -> torch.device:
    """Where an adapter of `module` belongs; the CPU for a skeleton without weights (`meta`)."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None or first.device.type == "meta" else first.device
