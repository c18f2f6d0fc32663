"""The tensors of a model folder as a stream, and a stream of tensors as a model folder: never all of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from peftctl.models.folder import weight_files
from peftctl.training.filesystem import rename
from peftctl.training.tensors import write_tensors


class Source:
    """The weights of a base model in a local folder, read one tensor at a time."""

    def __init__(self, folder: Path, place: str) -> None:
        self.files: dict[str, Path] = {}
        """Tensor name -> the file that holds it, in the order of the files."""
        for file in weight_files(folder, place):
            with safe_open(file, "pt") as tensors:
                self.files |= dict.fromkeys(tensors.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_size: float) -> int:
    """Write `tensors` into safetensors files of at most `shard_size` bytes each, with an index when there are several.

    A tensor larger than that has a file of its own. Returns the number of bytes. Raises StorageError.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        shards.append(list(held))
        write_tensors(folder / f"part-{len(shards):05d}", held)
        held.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if held and size + bytes_ > shard_size:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size, total = size + bytes_, total + bytes_
    flush()
    if len(shards) == 1:
        rename(folder / "part-00001", folder / "model.safetensors")
        return total
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        rename(folder / f"part-{number:05d}", folder / file)
        index |= dict.fromkeys(names, file)
    record = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return total
