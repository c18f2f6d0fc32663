"""The tensors of a model folder, one at a time, by their names in its files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peftctl.errors import ModelError
from peftctl.models.folder import weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that unquantised models are stored in."""


class Stored(NamedTuple):
    """Where a tensor is and what it is, from the header of its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The tensors of the safetensors files in `folder`; `place` names it in messages.

    `stored` holds them by name in the order of the files. Raises ModelError when files are missing or damaged.
    """

    def __init__(self, folder: Path, place: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.place = place
        self.stored: dict[str, Stored] = {}
        for path in weight_files(folder, place):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.offset_keys():
                        part = file.get_slice(name)
                        self.stored[name] = Stored(path, self._dtype(name, part.get_dtype()), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{place}/{path.name}: damaged or truncated: {error}") from error

    @property
    def elements(self) -> int:
        """How many numbers all the tensors hold."""
        return sum(torch.Size(stored.shape).numel() for stored in self.stored.values())

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, as it is in the file. Raises ModelError when the file cannot be read."""
        from safetensors import SafetensorError, safe_open

        path = self.stored[name].file
        try:
            with safe_open(path, "pt") as file:  # open for one tensor: what is mapped counts as memory in use
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.place}/{path.name}: damaged or truncated: {error}") from error
        return tensor

    def _dtype(self, name: str, code: str) -> torch.dtype:
        if code not in DTYPES:
            raise ModelError(f"{self.place}: `{name}` is stored as {code}, which cannot be merged")
        return DTYPES[code]
