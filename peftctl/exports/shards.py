"""Safetensors files written tensor by tensor: no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftctl.exports.plan import Part
from peftctl.exports.weights import DTYPES
from peftctl.models.folder import INDEX, WEIGHTS
from peftctl.training import filesystem

CODES = {dtype: code for code, dtype in DTYPES.items()}


def share_out(parts: list[Part], limit: float) -> list[list[Part]]:
    """The tensors of each file, in the order given; a file is larger than `limit` bytes only for one tensor alone."""
    files: list[list[Part]] = []
    size = 0
    for part in parts:
        if not files or size + part.size > limit:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.size
    return files


def write_shards(
    folder: Path, parts: list[Part], limit: float, value: Callable[[Part], Tensor]
) -> dict[str, filesystem.Written]:
    """Write all `parts` into `folder`, and an index when they take several files; each `value` is asked for once.

    Returns size and SHA-256 of every file. Raises StorageError when the disk refuses.
    """
    files = share_out(parts, limit)
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    names = names if len(names) > 1 else [WEIGHTS]
    written = {
        name: filesystem.write(folder / name, content(inside, value)) for name, inside in zip(names, files, strict=True)
    }
    if len(names) > 1:
        where = {part.name: name for name, inside in zip(names, files, strict=True) for part in inside}
        index = {"metadata": {"total_size": sum(part.size for part in parts)}, "weight_map": where}
        written[INDEX] = filesystem.write(folder / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode()])
    return written


def content(parts: list[Part], value: Callable[[Part], Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of one safetensors file."""
    ordered = sorted(parts, key=lambda part: -part.dtype.itemsize)  # wide dtypes first keep each tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in ordered:
        start, end = end, end + part.size
        header[part.name] = {"dtype": CODES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for part in ordered:
        tensor = value(part)
        assert (tensor.dtype, tuple(tensor.shape)) == (part.dtype, part.shape), part.name
        if part.size:
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        del tensor
