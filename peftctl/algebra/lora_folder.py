"""A LoRA folder in HF PEFT's format as the updates of its sites, and the way back; the base is not needed for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from peftctl.algebra.factors import Factors
from peftctl.config.quote import shown
from peftctl.engine.anatomy import under
from peftctl.engine.disk import method_of, write
from peftctl.engine.peft_config import COMMON, CONFIG, LORA, SCHEMA, read_config
from peftctl.engine.tensor_file import BASE_COPIES, ECHO, LONGEST, PREFIX, WEIGHTS, checked, header, is_copy, shapes
from peftctl.errors import AdapterError, Problem
from peftctl.exports.companions import ADAPTER_FILES, copy_files
from peftctl.methods.lora import LoRA
from peftctl.models.origin import ORIGIN
from peftctl.training.storage import staged

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Update:
    """What a LoRA adds to one weight: scale * B A."""

    A: Tensor
    """[r, in]; of a convolution, the positions of its kernel count as inputs."""
    B: Tensor
    """[out, r]"""
    scale: float = 1.0
    leaves: tuple[str, str] = LINEAR
    kernel: tuple[int, ...] = ()
    """[in, *size] of a convolution."""

    @property
    def rank(self) -> int:
        """Columns of B."""
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return len(self.B), self.A.shape[1]

    def factors(self) -> Factors:
        """The update with its scale in B."""
        return Factors(self.A.double(), self.scale * self.B.double())

    def on_disk(self) -> tuple[Tensor, Tensor]:
        """Both factors in float32, in the shapes that HF PEFT stores them in."""
        A, B = self.A.float(), self.B.float()
        if self.kernel:
            A, B = A.reshape(len(A), *self.kernel), B.reshape(*B.shape, *(1 for _ in self.kernel[1:]))
        return A.contiguous(), B.contiguous()


@dataclass(frozen=True)
class LoRAFolder:
    """All that a LoRA folder says."""

    place: Path
    config: Mapping[str, Any]
    updates: dict[str, Update]
    """By the name of the module."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """By their names on disk, without `base_model.model.`: biases, modules trained whole, rows of tokens, copies of the
    base's own embeddings."""

    @property
    def base(self) -> str | None:
        """The name of its base model."""
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    def is_copy(self, name: str) -> bool:
        """Whether `name`, one of `others`, is a matrix of the base that PEFT has written beside: nothing trained."""
        return is_copy(name, self.config.get("modules_to_save") or [])


def read_lora_folder(place: str | Path) -> LoRAFolder:
    """The LoRA in the folder `place`. Raises AdapterError for another method, and with all that is wrong in it."""
    folder = Path(place)
    config, where = read_config(folder), str(folder / CONFIG)
    cls = method_of(config, where)
    if cls is not LoRA:
        raise AdapterError(
            f"{folder}: `{cls.__module__.rpartition('.')[2]}` is no plain LoRA",
            "`peftctl adapters convert` makes one of it",
        )
    method = LoRA.from_peft(config, shapes(folder), where)
    tensors = read_tensors(folder, method)
    file = folder / WEIGHTS
    updates = {site: taken(tensors, site, method.scale(site), file) for site in method.target_modules}
    if rest := [name for name in sorted(tensors) if name.endswith((*LINEAR, *EMBEDDING))]:
        text = f"{file}: `{{}}` is not part of this adapter"
        raise AdapterError.of([Problem(text.format(shown(name, LONGEST))) for name in rest])
    return LoRAFolder(folder, config, updates, tensors)


def read_tensors(folder: Path, method: LoRA) -> dict[str, Tensor]:
    """Every tensor of the folder in float32, by its name without `base_model.model.`."""
    file, found = folder / WEIGHTS, {}
    problems: list[Problem] = []
    kinds = header(file)
    with safe_open(file, "pt") as tensors:
        for key, (kind, _) in kinds.items():
            name = key.removeprefix(PREFIX)
            if ECHO.fullmatch(key):
                continue
            if not known(name, method):
                problems.append(Problem(f"{file}: `{shown(key, LONGEST)}` is not part of this adapter"))
            else:
                found[name] = checked(tensors, file, key, kind, problems)
    if problems:
        raise AdapterError.of(problems)
    return found


def known(name: str, method: LoRA) -> bool:
    """Whether a LoRA folder may hold a tensor called `name`."""
    if name.endswith((*LINEAR, *EMBEDDING)):
        return any(name.startswith(f"{site}.") for site in method.target_modules)
    if any(under(name, entry) for entry in method.modules_to_save):
        return True
    rows = method.trainable_token_indices is not None and name.endswith(".token_adapter.trainable_tokens_delta")
    return rows or (method.bias != "none" and name.endswith(".bias")) or name.endswith(BASE_COPIES)


def taken(tensors: dict[str, Tensor], site: str, scale: float, file: Path) -> Update:
    """The update of `site`, whose factors are taken out of `tensors`."""
    leaves = next(pair for pair in (LINEAR, EMBEDDING) if f"{site}.{pair[0]}" in tensors)
    A, B = tensors.pop(f"{site}.{leaves[0]}"), tensors.pop(f"{site}.{leaves[1]}", None)
    if B is None:
        raise AdapterError(f"{file}: `{site}.{leaves[1]}` is missing")
    if A.ndim < 2 or B.ndim != A.ndim or B.shape[1] != len(A) or any(size != 1 for size in B.shape[2:]):
        what = f"A is {list(A.shape)} and B {list(B.shape)}"
        raise AdapterError(f"{file}: `{site}`: {what}, which do not multiply", "of a convolution with groups?")
    return Update(A.flatten(1), B.flatten(1), scale, leaves, tuple(A.shape[1:]) if A.ndim > 2 else ())


def described(config: Mapping[str, Any], updates: Mapping[str, Update], **keys: Any) -> dict[str, Any]:
    """adapter_config.json for `updates`: the common keys and the settings of `config`, ranks and scales of its own.

    The scale of each update is written as alpha / r.
    """
    ranks = {site: update.rank for site, update in updates.items()}
    alphas = {site: tidy(update.scale * update.rank) for site, update in updates.items()}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    kept = {key: config[key] for key in (*COMMON, *LORA) if key in config}
    return (
        LORA
        | kept
        | {
            "peft_type": "LORA",
            "peft_version": SCHEMA,
            "r": r,
            "lora_alpha": alpha,
            "use_rslora": False,
            "init_lora_weights": True,
            "target_modules": sorted(updates),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {"^" + re.escape(site): rank for site, rank in ranks.items() if rank != r},
            "alpha_pattern": {"^" + re.escape(site): value for site, value in alphas.items() if value != alpha},
            **keys,
        }
    )


def tidy(number: float) -> float:
    """`number` without the digits that rounding left, and whole where it is."""
    rounded = float(f"{number:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def most_common(values: Collection[Any]) -> Any:
    """The value that most share, so that the patterns beside it are few; of equals the smallest."""
    every = list(values)
    return max(sorted(set(every)), key=every.count)


def write_lora_folder(adapter: LoRAFolder, output: Path) -> int:
    """Write `adapter` into the folder `output`, all or nothing; returns its bytes.

    A chat template and licences, and what says which base it is of, are copied from `adapter.place`.
    Raises StorageError when `output` exists or the disk refuses.
    """
    tensors = {f"{PREFIX}{name}": tensor.float().contiguous() for name, tensor in adapter.others.items()}
    for site, update in adapter.updates.items():
        pairs = zip(update.leaves, update.on_disk(), strict=True)
        tensors |= {f"{PREFIX}{site}.{leaf}": tensor for leaf, tensor in pairs}
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        text = f"{output}: `{{}}` would not be finite and was not written"
        raise AdapterError.of([Problem(text.format(key)) for key in broken])
    with staged(output) as folder:
        write(folder, adapter.config, {WEIGHTS: tensors}, output)
        copy_files(adapter.place, folder, (ORIGIN, *ADAPTER_FILES))
        return sum(path.stat().st_size for path in folder.iterdir())
