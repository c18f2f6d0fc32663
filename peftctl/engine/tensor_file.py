"""A tensor file that a stranger wrote: what its header says, and its tensors, found to be exactly the wanted ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftctl.config.near import did_you_mean
from peftctl.config.quote import shown
from peftctl.engine.anatomy import under
from peftctl.errors import AdapterError, Problem

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

LARGEST, MOST = 32 * 2**20, 100_000
"""Bytes of a header, and tensors in it. A LoRA on every expert of 48 layers of 128 has 37,000, in 6 MB."""

LONGEST = 200
"""Characters of a tensor's name, or of what is wrong with a header, that a message shows."""

FILES = (WEIGHTS, PRIVATE)

Sizes = dict[str, tuple[int, ...]]
"""Tensor name in a file -> shape."""

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name in the file -> type of number, shape."""


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
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
        if LARGEST < size < file.stat().st_size:
            raise AdapterError(f"{file}: a header of {size:,} bytes, more than {LARGEST:,}, which no adapter needs")
        with safe_open(file, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            if len(slices) > MOST:
                raise AdapterError(f"{file}: {len(slices):,} tensors, more than {MOST:,}, which no adapter needs")
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        what = shown(str(error), LONGEST)  # it quotes the header
        raise AdapterError(f"{file}: not a safetensors file, or a damaged one: {what}") from None


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
            else:
                values[key] = checked(tensors, file, key, kind, problems)
        for key in sorted(copies):
            if have[key][0] not in FLOATS or not same(model, key, tensors.get_tensor(key)):
                text = f"{file}: `{shown(key, LONGEST)}` is a base weight that differs from this model's"
                problems.append(Problem(text, "resized or another base?"))
    if problems:
        raise AdapterError.of(problems)
    return values


def checked(tensors: Any, file: Path, key: str, kind: str, problems: list[Problem]) -> Tensor:
    """The tensor `key` of an opened file in float32; notes in `problems` what is wrong with its numbers."""
    if kind not in FLOATS:
        problems.append(Problem(f"{file}: `{key}` holds {kind}, which is no floating-point type"))
        return torch.empty(0)
    value: Tensor = tensors.get_tensor(key).float()
    if not bool(value.isfinite().all()):
        problems.append(Problem(f"{file}: `{key}` is not finite"))
    return value


def is_copy(key: str, saved: Iterable[str]) -> bool:
    """Whether `key` is a matrix of the base that HF PEFT has written beside, and none of the modules `saved`."""
    return key.endswith(BASE_COPIES) and not any(under(key, entry) for entry in saved)


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
