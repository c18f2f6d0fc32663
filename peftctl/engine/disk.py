"""Adapter folders in HF PEFT's format: adapter_config.json and adapter_model.safetensors, both directions.

A folder to be loaded is a stranger's: sites come from the tensor names, shapes are compared before anything is
allocated, and names must be exactly those that the config implies, so that no file can reach the base model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftctl.config.near import did_you_mean
from peftctl.engine.adapter import Adapter
from peftctl.engine.attach import adapters_of, attach, detach, methods
from peftctl.engine.method import METHODS, Method
from peftctl.engine.peft_config import common
from peftctl.errors import AdapterError, Problem, StorageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_COPIES = (".base_layer.weight", "embed_tokens.weight", "lm_head.weight", "wte.weight", "shared.weight")
"""Endings of whole base matrices that PEFT writes beside an adapter of an embedding."""

ECHOES = (".modules_to_save.", ".original_module.")
"""Infixes under which PEFT repeats the biases of modules trained whole; they are never read."""


def save(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write the adapter called `name` into `folder` itself, as HF PEFT would; returns the folder.

    Raises AdapterError when `name` is not attached or a tensor is not finite, StorageError when the disk refuses.
    """
    folder = Path(folder)
    method = named(model, name)
    adapters = adapters_of(model, name)
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in on_disk(adapters).items()}
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError.of([Problem(f"{folder}: `{key}` is not finite and was not saved") for key in broken])
    config = common(model, method.peft_type) | method.peft_config(adapters)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read what it writes
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: the adapter could not be written: {error}") from error
    return folder


def load(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Attach the adapter in `folder` to `model`, in place, under `name`; whatever method the folder says.

    Raises AdapterError, listing every mistake, when folder and model do not fit; `model` is then as it was.
    """
    folder = Path(folder)
    config = read_config(folder)
    place = str(folder / CONFIG)
    method = method_of(config, place).from_peft(config, shapes(folder), place)
    attach(model, method, name)
    try:
        read_into(model, folder, name)
    except AdapterError:
        detach(model, name)
        raise
    return model


@torch.no_grad()
def read_into(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Fill the attached adapter `name` with the tensors in `folder`; names, shapes and values must be right."""
    file = Path(folder) / WEIGHTS
    want = on_disk(adapters_of(model, name))
    have = {PREFIX + key if not key.startswith("prompt_") else key: shape for key, shape in shapes(folder).items()}
    have = {key: shape for key, shape in have.items() if not any(echo in key for echo in ECHOES)}
    copies = {key for key in have.keys() - want.keys() if key.endswith(BASE_COPIES)}
    problems = [Problem(f"{file}: `{key}` is missing") for key in sorted(want.keys() - have.keys())]
    problems += [
        Problem(f"{file}: `{key}` is not part of this adapter", did_you_mean(key, list(want)))
        for key in sorted(have.keys() - want.keys() - copies)
    ]
    problems += [
        Problem(f"{file}: `{key}` has shape {list(have[key])}, the model wants {list(tensor.shape)}", "another base?")
        for key, tensor in want.items()
        if key in have and tuple(tensor.shape) != have[key]
    ]
    if problems:
        raise AdapterError.of(problems)
    with safe_open(file, "pt") as tensors:
        values = {key: tensors.get_tensor(key) for key in want}
        problems = [Problem(f"{file}: `{key}` is not finite") for key, t in values.items() if not t.isfinite().all()]
        problems += [
            Problem(f"{file}: `{key}` is a base weight that differs from this model's", "resized or another base?")
            for key in sorted(copies)
            if not same(model, key, tensors.get_tensor(key))
        ]
    if problems:
        raise AdapterError.of(problems)
    for key, tensor in want.items():
        tensor.copy_(values[key])


def same(model: nn.Module, key: str, copy: Tensor) -> bool:
    """Whether a base matrix that came with an adapter is the one that `model` has."""
    site = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    try:
        weight = model.get_submodule(site).get_parameter("weight")
    except AttributeError:
        return False
    if weight.is_meta:
        return weight.shape == copy.shape
    return weight.shape == copy.shape and torch.allclose(weight.float().cpu(), copy.float(), rtol=1e-2)


def on_disk(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Every tensor of the adapters by its name in the file."""
    return {
        adapter.peft_key(site, leaf): tensor
        for site, adapter in adapters.items()
        for leaf, tensor in adapter.state_dict(keep_vars=True).items()
    }


def named(model: nn.Module, name: str) -> Method:
    """The method of the adapter called `name`."""
    try:
        return methods(model)[name]
    except KeyError:
        have = ", ".join(f"`{n}`" for n in methods(model)) or "none"
        raise AdapterError(f"adapter `{name}`: not attached to this model", f"attached: {have}") from None


def method_of(config: Mapping[str, Any], place: str) -> type[Method]:
    """The method that an adapter_config.json belongs to."""
    found = next((cls for cls in METHODS.values() if cls.reads(config)), None)
    if found is None:
        known = ", ".join(sorted({cls.peft_type for cls in METHODS.values()}))
        raise AdapterError(f"{place}: peft_type: `{config.get('peft_type')}` is not supported", f"supported: {known}")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of `folder`: at most 1 MB, no repeated keys, no NaN."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    if not path.is_file():
        raise AdapterError(f"{folder}: no adapter here: `{CONFIG}` is missing")
    if path.stat().st_size > 1 << 20:
        raise AdapterError(f"{path}: larger than 1 MB, which no adapter needs")
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=unique(path), parse_constant=refuse(path))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object")
    return config


def unique(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise AdapterError(f"{path}: a key stands there twice")
        return mapping

    return build


def refuse(path: Path) -> Callable[[str], Any]:
    def constant(word: str) -> Any:
        raise AdapterError(f"{path}: `{word}` is not a number")

    return constant


def shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Tensor name, without `base_model.model.`, -> shape, from the header alone."""
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        pickle = [path.name for path in sorted(Path(folder).glob("adapter_model.*"))]
        hint = f"`{pickle[0]}` is a pickle, which is never read: save it as safetensors" if pickle else None
        raise AdapterError(f"{file}: missing", hint)
    try:
        with safe_open(file, "pt") as tensors:
            return {key.removeprefix(PREFIX): tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a safetensors file, or a damaged one: {error}") from None
