"""Nested Python values as JSON and safetensors, and back bit for bit; no pickle.

Numbers, text and their structure go to JSON; tensors go to one flat dict under the path that leads to them, such as
`model.layers.0.self_attn.q_proj.lora_A.weight/exp_avg`. What JSON cannot say is a dict with the key `$`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftctl.errors import StorageError
from peftctl.training import filesystem

_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pack(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """What JSON can hold of `value`; its tensors are added to `tensors` under `place/...`.

    Raises TypeError for anything but None, bool, int, float, str, list, tuple, dict and Tensor.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
    if isinstance(value, Tensor):
        assert place not in tensors, place
        tensors[place] = value
        return {"$": "tensor", "name": place}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{place}/{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$": "tuple", "items": items}
    if isinstance(value, Mapping):
        packed = {key: pack(item, tensors, f"{place}/{key}") for key, item in value.items()}
        plain = all(isinstance(key, str) for key in packed) and "$" not in packed
        return packed if plain else {"$": "dict", "items": [[key, item] for key, item in packed.items()]}
    raise TypeError(f"{place}: a `{type(value).__name__}` cannot be saved without pickle")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` was given. Raises KeyError, TypeError or ValueError for what `pack` never writes."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    match packed.get("$"):
        case None:
            return {key: unpack(item, tensors) for key, item in packed.items()}
        case "float":
            return float(packed["value"])
        case "tensor":
            return tensors[packed["name"]]
        case "tuple":
            return tuple(unpack(item, tensors) for item in packed["items"])
        case "dict":
            return {key: unpack(item, tensors) for key, item in packed["items"]}
        case other:
            raise ValueError(f"unknown kind of value `{other}`")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> filesystem.Written:
    """Writes a safetensors file, one tensor in memory at a time; each keeps its exact dtype.

    Views, shared storage and any memory layout are fine: every tensor gets bytes of its own.
    Raises TypeError for a dtype that is not stored, StorageError when the disk refuses.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype `{tensor.dtype}` cannot be saved")
    # Widest dtype first keeps every tensor aligned, as the format asks.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return filesystem.write(path, _chunks(header, [tensor for _, tensor in ordered]))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, in memory that nobody else shares; StorageError when damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with filesystem.guarded(path):
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise StorageError(f"{path}: not a readable safetensors file: {error}") from error


def _chunks(header: Mapping[str, Any], tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data
