"""Adapter folders in HF PEFT's format: adapter_config.json and adapter_model.safetensors, both directions.

A folder to be loaded is a stranger's: sites come from the tensor names, shapes are compared before anything is
allocated, and names must be exactly those that the config implies, so that no file can reach the base model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftctl.config.quote import quoted, shown
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import modules
from peftctl.engine.attach import adapters_of, attach, methods, unattached
from peftctl.engine.implied import left_out
from peftctl.engine.method import METHODS, Method, Targeted
from peftctl.engine.peft_config import CONFIG, common, read_config
from peftctl.engine.tensor_file import FILES, LONGEST, PRIVATE, WEIGHTS, Sizes, read, shapes
from peftctl.errors import AdapterError, Problem, StorageError

MAPPED = 64 << 20
"""Bytes of a file that is read back that are mapped at once."""


def save(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write the adapter called `name` into `folder` itself, as HF PEFT would; returns the folder.

    Raises AdapterError when `name` is not attached or a tensor is not finite, StorageError when the disk refuses.
    """
    folder = Path(folder)
    method = named(model, name)
    adapters = adapters_of(model, name)
    tensors, private = ({key: kept(t) for key, t in part(adapters).items()} for part in (on_disk, beside))
    broken = [key for key, tensor in (tensors | private).items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError.of([Problem(f"{folder}: `{key}` is not finite and was not saved") for key in broken])
    config = common(model, method.peft_type) | method.peft_config(adapters)
    write(folder, config, {WEIGHTS: tensors} | ({PRIVATE: private} if private else {}), folder)
    return folder


def write(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]], place: str | Path
) -> None:
    """Write an adapter's config and tensor files, and read the tensors back.

    Raises StorageError, about `place`, when the disk refuses, or gives back something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})
            if wrong := differing(folder / name, tensors):
                raise StorageError(f"{place}: `{wrong[0]}` does not read back as it was written", "check the disk")
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        for name in files:
            shutil.copymode(folder / CONFIG, folder / name)  # safetensors lets nobody else read what it writes
    except OSError as error:
        raise StorageError(f"{place}: the adapter could not be written: {error}") from error
    except SafetensorError as error:  # which tells the number of an error of the system in its text
        number = re.search(r"os error (\d+)", str(error))
        told = os.strerror(int(number[1])).lower() if number else str(error)
        raise StorageError(f"{place}: the adapter could not be written: {told}") from error


def differing(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors that a file does not hold bit for bit.

    It is opened anew after every so many bytes: what was looked at of a mapped file counts as memory in use.
    """
    parts, size = [[]], 0  # type: ignore[var-annotated]
    for key, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        if size > MAPPED and parts[-1]:
            parts, size = [*parts, []], 0
        parts[-1].append(key)
    wrong = []
    for part in parts:
        with safe_open(path, "pt") as file:
            wrong += [key for key in part if not torch.equal(file.get_tensor(key), tensors[key].cpu())]
    return wrong


def load(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Attach the adapter in `folder` to `model`, in place, under `name`; whatever method the folder says.

    Raises AdapterError, listing every mistake, when folder and model do not fit; `model` is then as it was.
    """
    method, values = fitting(model, Path(folder))
    attach(model, method, name)
    fill(model, name, values)
    return model


def fitting(model: nn.Module, folder: Path) -> tuple[Method, list[dict[str, Tensor]]]:
    """The method in `folder` and the tensors of both its files, found to fit `model`, which stays as it is.

    Raises AdapterError, listing every mistake.
    """
    config = read_config(folder)
    place = str(folder / CONFIG)
    read_off = method_of(config, place).from_peft(config, shapes(folder), place)
    if isinstance(read_off, Targeted):
        text = f"{folder / WEIGHTS}: nothing for `{{}}`, which `target_modules` names"
        missing = [Problem(text.format(name)) for name in left_out(model, config, read_off.target_modules)]
        if missing:
            raise AdapterError.of(missing)
    method = exact(read_off, model)
    wanted = planned(model, method, folder)
    return method, [read(model, folder / file, want) for file, want in zip(FILES, wanted, strict=True)]


@torch.no_grad()
def fill(model: nn.Module, name: str, values: Sequence[Mapping[str, Tensor]]) -> None:
    """Write `values`, of both files by the names there, into the adapter `name`."""
    for part, found in zip((on_disk, beside), values, strict=True):
        for key, tensor in part(adapters_of(model, name)).items():
            tensor.copy_(found[key])


def exact(method: Method, model: nn.Module) -> Method:
    """`method` with targets that match the modules it names and, unlike names in a recipe, no others by suffix.

    Names that `model` does not have are left out: their tensors are then found to belong to nothing.
    """
    if not isinstance(method, Targeted):
        return method
    known = {site.name for site in modules(model)}
    names = [re.escape(name) for name in method.target_modules if name in known]
    return replace(method, target_modules=f"(?:{'|'.join(names)})" if names else [])


def planned(model: nn.Module, method: Method, folder: Path) -> list[Sizes]:
    """What `method` would have on `model`, in both files; nothing is allocated for it."""
    if isinstance(method, Targeted) and not method.target_modules:
        return [{}, {}]
    try:
        sites = method.sites(model)
        with torch.device("meta"):
            adapters = method.build(model, sites)
    except AdapterError as error:  # it speaks of a recipe's `method` block, and this one came from a file
        text = f"{folder / CONFIG}: "
        problems = [Problem(shown(p.text, LONGEST).replace("method.", text, 1), p.hint) for p in error.problems]
        raise AdapterError.of(problems) from None
    named = {site.name: adapter for site, adapter in zip(sites, adapters, strict=True)}
    return [sizes(part(named)) for part in (on_disk, beside)]


def sizes(tensors: Mapping[str, Tensor]) -> Sizes:
    """Their shapes."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def on_disk(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Every tensor of the adapters by its name in PEFT's file."""
    return by_key(adapters, {site: adapter.exported() for site, adapter in adapters.items()})


def beside(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """What the adapters keep for themselves, by its name in the file beside."""
    return by_key(adapters, {site: adapter.private() for site, adapter in adapters.items()})


def by_key(adapters: Mapping[str, Adapter], parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of each site by their names in a file; what adapters share has one name."""
    return {adapters[site].peft_key(site, leaf): t for site, leaves in parts.items() for leaf, t in leaves.items()}


def kept(tensor: Tensor) -> Tensor:
    """A copy to be written, of a shape and an order in memory that safetensors takes."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def named(model: nn.Module, name: str) -> Method:
    """The method of the adapter called `name`."""
    if name not in methods(model):
        raise AdapterError.of([unattached(model, name)])
    return methods(model)[name]


def method_in(folder: Path) -> Method:
    """The method that `folder` describes. Raises AdapterError."""
    config, place = read_config(folder), str(folder / CONFIG)
    return method_of(config, place).from_peft(config, shapes(folder), place)


def method_of(config: Mapping[str, Any], place: str) -> type[Method]:
    """The method that an adapter_config.json belongs to."""
    of_type = [cls for cls in METHODS.values() if cls.peft_type == config.get("peft_type")]
    found = next((cls for cls in METHODS.values() if cls.reads(config)), None)
    if found is None and not of_type:
        known = ", ".join(sorted({cls.peft_type for cls in METHODS.values()}))
        what = f"peft_type: {quoted(str(config.get('peft_type')))} is not supported"
        raise AdapterError(f"{place}: {what}", f"supported: {known}")
    return found or of_type[0]  # the latter will name the key that it does not support
