"""Adapter folders in HF PEFT's format: adapter_config.json and adapter_model.safetensors, both directions.

A folder to be loaded is a stranger's: sites come from the tensor names, shapes are compared before anything is
allocated, and names must be exactly those that the config implies, so that no file can reach the base model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftctl.config.near import did_you_mean
from peftctl.config.quote import quoted, shown
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import modules
from peftctl.engine.attach import adapters_of, attach, methods, unattached
from peftctl.engine.implied import left_out
from peftctl.engine.method import METHODS, Method, Targeted
from peftctl.engine.peft_config import CONFIG, common, read_config
from peftctl.errors import AdapterError, Problem, StorageError

WEIGHTS = "adapter_model.safetensors"
PRIVATE = "resume.safetensors"
"""Beside PEFT's files, for methods that keep something PEFT has no place for; PEFT does not look at it."""

PREFIX = "base_model.model."
BASE_COPIES = (".base_layer.weight", "embed_tokens.weight", "lm_head.weight", "wte.weight", "shared.weight")
"""Endings of whole base matrices that PEFT writes beside an adapter of an embedding."""

ECHO = re.compile(r".*\.(modules_to_save|original_module)\.(.*\.)?bias")
"""Names under which PEFT repeats the biases of modules trained whole; they are never read."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""safetensors' names of the types of number that an adapter may come in."""

SHORT = 8
"""Unexpected tensors up to which each gets a hint; comparing thousands of names would take minutes."""

LONGEST = 200
"""Characters of a tensor's name that a message shows."""

FILES = (WEIGHTS, PRIVATE)

Sizes = dict[str, tuple[int, ...]]
"""Tensor name in a file -> shape."""

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name in the file -> type of number, shape."""


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if private:
            save_file(private, folder / PRIVATE, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read what it writes
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: the adapter could not be written: {error}") from error
    return folder


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
        raise AdapterError.of([Problem(p.text.replace("method.", text, 1), p.hint) for p in error.problems]) from None
    named = {site.name: adapter for site, adapter in zip(sites, adapters, strict=True)}
    return [sizes(part(named)) for part in (on_disk, beside)]


def sizes(tensors: Mapping[str, Tensor]) -> Sizes:
    """Their shapes."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@torch.no_grad()
def read(model: nn.Module, file: Path, want: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors in `file` in float32, which must be those of `want` and finite."""
    if not want and not file.exists():
        return {}
    have = header(file)
    extra = {key for key in have.keys() - want.keys() if not ECHO.fullmatch(key)}
    copies = {key for key in extra if key.endswith(BASE_COPIES)}
    near = list(want) if len(extra) <= SHORT else []
    problems = [Problem(f"{file}: `{key}` is missing") for key in sorted(want.keys() - have.keys())]
    problems += [strange(file, key, near) for key in sorted(extra - copies)]
    values = {}
    with safe_open(file, "pt") as tensors:
        for key in sorted(want.keys() & have.keys()):
            kind, shape = have[key]
            if shape != want[key]:
                text = f"{file}: `{key}` has shape {list(shape)}, the model wants {list(want[key])}"
                problems.append(Problem(text, "another base?"))
            elif kind not in FLOATS:
                problems.append(Problem(f"{file}: `{key}` holds {kind}, which is no floating-point type"))
            else:
                values[key] = tensors.get_tensor(key).float()
                if not bool(values[key].isfinite().all()):
                    problems.append(Problem(f"{file}: `{key}` is not finite"))
        for key in sorted(copies):
            if have[key][0] not in FLOATS or not same(model, key, tensors.get_tensor(key)):
                text = f"{file}: `{shown(key, LONGEST)}` is a base weight that differs from this model's"
                problems.append(Problem(text, "resized or another base?"))
    if problems:
        raise AdapterError.of(problems)
    return values


def strange(file: Path, key: str, near: Iterable[str] = ()) -> Problem:
    """That the tensor `key` belongs to nothing."""
    text = f"{file}: `{shown(key, LONGEST)}` is not part of this adapter"
    return Problem(text, did_you_mean(key, near) or "another base?")


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


def method_of(config: Mapping[str, Any], place: str) -> type[Method]:
    """The method that an adapter_config.json belongs to."""
    of_type = [cls for cls in METHODS.values() if cls.peft_type == config.get("peft_type")]
    found = next((cls for cls in METHODS.values() if cls.reads(config)), None)
    if found is None and not of_type:
        known = ", ".join(sorted({cls.peft_type for cls in METHODS.values()}))
        what = f"peft_type: {quoted(str(config.get('peft_type')))} is not supported"
        raise AdapterError(f"{place}: {what}", f"supported: {known}")
    return found or of_type[0]  # the latter will name the key that it does not support


def shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Tensor name, without `base_model.model.`, -> shape, from the headers of both files alone."""
    file, extra = (Path(folder) / name for name in FILES)
    found = header(file) | (header(extra) if extra.exists() else {})
    return {key.removeprefix(PREFIX): shape for key, (_, shape) in found.items()}


def header(file: Path) -> Header:
    """What a tensor file says that it holds."""
    if not file.is_file():
        pickle = [path.name for path in sorted(file.parent.glob("adapter_model.*"))]
        hint = f"`{pickle[0]}` is a pickle, which is never read: save it as safetensors" if pickle else None
        raise AdapterError(f"{file}: missing", hint)
    try:
        with safe_open(file, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a safetensors file, or a damaged one: {error}") from None
