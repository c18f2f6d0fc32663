"""Weights of a base model as its files have them, for a model that was quantised on its way into memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.sample import Sample
from peftctl.errors import AdapterError

HINT = "load the model from a folder with its unquantised `model*.safetensors`"


class BaseFiles:
    """The files that `model` was loaded from: those of `sample`, else of the folder that the model itself names.

    Raises AdapterError when there is no such folder.
    """

    def __init__(self, model: nn.Module, sample: Sample | None) -> None:
        named = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", "")
        folder = sample.folder if sample and sample.folder else Path(str(named)) if named else None
        files = sorted(folder.glob("model*.safetensors")) if folder and folder.is_dir() else []
        if not files:
            raise AdapterError(f"{folder or 'the base model'}: its unquantised weights cannot be found", HINT)
        self.folder, self.prefix = folder, f"{getattr(model, 'base_model_prefix', '')}."
        try:
            self.file_of = {name: file for file in files for name in names_in(file)}
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{folder}: damaged or truncated: {error}") from None

    def weight(self, site: str, host: nn.Module) -> Tensor:
        """The weight [out, in] of the linear `host` called `site`, in float32 on the CPU."""
        name = f"{site}.weight"
        found = next((n for n in (name, name.removeprefix(self.prefix), self.prefix + name) if n in self.file_of), None)
        if found is None:
            raise AdapterError(f"{self.folder}: `{name}` is not in its files under this name", HINT)
        try:
            with safe_open(self.file_of[found], "pt") as tensors:
                kept: Tensor = tensors.get_tensor(found)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{self.folder}: `{found}` cannot be read: {error}") from None
        matrix = kept.T if hosts.transposed_on_disk(host) else kept
        inside, out = hosts.features(host)
        if not kept.is_floating_point() or matrix.shape != (out, inside):
            what = f"{list(kept.shape)} of {str(kept.dtype).removeprefix('torch.')}"
            raise AdapterError(f"{self.folder}: `{found}` is {what}, no weight of {out} by {inside} numbers", HINT)
        return matrix.to(torch.float32)


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a file."""
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())
