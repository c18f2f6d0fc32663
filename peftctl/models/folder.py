"""A model's folder, looked at before any library reads it: its configuration, its weight files, its fingerprint."""

from __future__ import annotations

import hashlib
import json
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.errors import ModelError, Problem

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model.safetensors"
"""What diffusers calls `WEIGHTS`; its index is called after it."""
PIPELINE = "model_index.json"
"""In the folder of a pipeline of diffusers, whose parts are folders in it."""
NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Its parts that have weights and say what is drawn."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOO_LARGE = 64 * 2**20
"""Bytes: no configuration, index or safetensors header of a real model comes near."""


def read_json(path: Path, place: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError, with line and column, when there is none."""
    try:
        if path.stat().st_size > TOO_LARGE:
            raise ModelError(f"{place}/{path.name}: larger than {TOO_LARGE >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{place}/{path.name}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{place}/{path.name}:{error.lineno}:{error.colno}: not JSON: {error.msg.lower()}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8; thousands of brackets
        raise ModelError(f"{place}/{path.name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{place}/{path.name}: expected an object; got a {type(value).__name__}")
    return value


def refuse_absurd(config: dict[str, Any], place: str) -> None:
    """Raise ModelError for sizes that no model has: a library builds lists as long as a configuration says."""
    todo: list[tuple[str, Any]] = list(config.items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += value.items()
        elif isinstance(value, int) and not isinstance(value, bool):
            most = next((most for part, most in COUNTS.items() if part in key), LARGEST)
            if abs(value) > most:
                raise ModelError(f"{place}: `{key}: {value if abs(value) < 1 << 64 else '...'}`: more than {most:,}")


def read_config(folder: Path, place: str) -> dict[str, Any]:
    """`config.json` of a base model, or a ModelError that says what the folder is instead."""
    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / CONFIG).is_file():
        hint = "name a folder that `save_pretrained` wrote, with `config.json` and `*.safetensors` in it"
        if adapter:
            hint = "it holds an adapter: name its base here, and the adapter in `method.init_from`"
        elif (folder / PIPELINE).is_file():
            hint = "it holds a pipeline of diffusers, which `trainer.task: text_to_image` trains"
        elif ggufs := sorted(folder.glob("*.gguf")):
            hint = f"name the file itself: `{place}/{ggufs[0].name}`"
        raise ModelError(f"{place}: no `{CONFIG}` in this folder", hint)
    if adapter:
        raise ModelError(
            f"{place}: holds an adapter beside the model, which would be loaded unasked",
            "move `adapter_config.json` and `adapter_model.safetensors` into a folder of their own",
        )
    config = read_json(folder / CONFIG, place)
    vet(config, f"{place}/{CONFIG}")
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise ModelError(
            f"{place}: its weights are already quantised (`{method}`)",
            "name the checkpoint it was made from, and set `quantization: nf4`",
        )
    return config


def vet(config: dict[str, Any], place: str) -> None:
    """Raise ModelError for a configuration that asks for code, or for more than any machine has."""
    _no_foreign_code(config, place)
    refuse_absurd(config, place)


def _no_foreign_code(config: dict[str, Any], place: str) -> None:
    """Refuse the keys by which a configuration has transformers fetch code, or read other weight files than ours."""
    values: list[tuple[str, Any]] = list(config.items())
    for key, value in values:
        if isinstance(value, dict):
            values.extend((key if key.endswith("_implementation") else inner, more) for inner, more in value.items())
        code = "_implementation" in key and isinstance(value, str) and "/" in value
        if code or (key == "transformers_weights" and value is not None):
            raise ModelError(f"{place}: `{key}: {value}` would load foreign code or files", f"remove `{key}`")


def weight_files(folder: Path, place: str) -> list[Path]:
    """The safetensors files of the model: `model.safetensors`, or the shards of its index, in order of name.

    Of a pipeline of diffusers, those of its parts.

    Raises:
        ModelError: none here, only pickles here, an index that names what is not here.
    """
    if (folder / PIPELINE).is_file():
        return [file for name in networks(folder, place) for file in weight_files(folder / name, f"{place}/{name}")]
    for name in (WEIGHTS, DIFFUSERS):
        if (folder / name).is_file():
            return [folder / name]
    if (index := index_of(folder)) is None:
        pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
        if pickles:
            raise ModelError(
                f"{place}: its weights are pickles (`{pickles[0]}`), which can run any code when read",
                "convert to safetensors: load it once with transformers and `save_pretrained` it into a new folder",
            )
        raise ModelError(
            f"{place}: no weights in this folder (`{WEIGHTS}` or `{INDEX}`)",
            "was the download interrupted, or only the configuration copied?",
        )
    names = shards(folder, index, place)
    if missing := [name for name in names if not (folder / name).is_file()]:
        again = "copy or download it again"
        raise ModelError.of([Problem(f"{place}: `{name}` is missing, named in `{index}`", again) for name in missing])
    return [folder / name for name in names]


def wanted_files(folder: Path, place: str, alone: str = WEIGHTS) -> list[str]:
    """The weight files that belong to what is in `folder`, there or not; `alone` is one that needs no index."""
    if (folder / PIPELINE).is_file():
        parts = [(name, WEIGHTS if name.startswith("text") else DIFFUSERS) for name in networks(folder, place)]
        return [f"{name}/{file}" for name, own in parts for file in wanted_files(folder / name, f"{place}/{name}", own)]
    index = index_of(folder)
    return [alone] if index is None else shards(folder, index, place)


def networks(folder: Path, place: str) -> list[str]:
    """The parts of a pipeline that have weights, in the order of `NETWORKS`."""
    index = read_json(folder / PIPELINE, place)
    return [name for name in NETWORKS if isinstance(index.get(name), list) and index[name][-1:] not in ([], [None])]


def index_of(folder: Path) -> str | None:
    """The name of the index of a model in several files; None where there is none."""
    return next((name for name in (INDEX, f"{DIFFUSERS}.index.json") if (folder / name).is_file()), None)


def shards(folder: Path, index: str, place: str) -> list[str]:
    """The file names in the index of a model in several files."""
    table = read_json(folder / index, place).get("weight_map")
    names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
    if not names:
        raise ModelError(f"{place}/{index}: `weight_map` is missing or empty")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{place}/{index}: `{name}` is not the name of a safetensors file in this folder")
    return names


COUNTS = {"layer": 10_000, "block": 10_000, "expert": 100_000, "label": 1_000_000}
"""Parts of the names of keys that count what is built one by one, and the most of them."""
LARGEST = 2**31
"""Of any other number of a configuration."""


class Stored(NamedTuple):
    """What the weight files hold, from their headers alone."""

    tensors: int
    """How many, in all files together."""

    largest: int
    """The largest dimension of any of them."""

    numbers: int
    """How many numbers they have, all together."""


def check_weights(files: list[Path], place: str) -> Stored:
    """Open every file, so that a truncated or damaged one is named, and look at its header."""
    from safetensors import SafetensorError, safe_open

    problems, count, largest, numbers = [], 0, 0, 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                    count += 1
                    shape = tensors.get_slice(name).get_shape()
                    largest, numbers = max(largest, *shape, 0), numbers + prod(shape)
        except (SafetensorError, OSError) as error:
            problems.append(Problem(f"{place}/{path.name}: damaged or truncated: {error}", "copy or download it again"))
    if problems:
        raise ModelError.of(problems)
    return Stored(count, largest, numbers)


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one base from another, without reading it all; plain JSON.

    Returns:
        `config`: sha256 of the configuration, less what differs from one saving to the next;
        `weights`: sha256 over every file's name, size, header and 16 samples of 4 KiB, which a fine-tuned sibling of
        equal shapes does not share; `bytes`: size of the weights; `commit`: of the hub's repository, or None.

    Raises:
        ModelError: the folder holds no configuration or no weights.
    """
    place = str(folder)
    pipeline = (folder / PIPELINE).is_file()
    parts = [folder / name for name in networks(folder, place)] if pipeline else [folder]
    configs = [read_json(part / CONFIG, str(part)) for part in parts]
    for config in configs:
        for key in ("transformers_version", "_diffusers_version", "_name_or_path"):
            config.pop(key, None)
    digest, size = hashlib.sha256(), 0
    for path in weight_files(folder, place):
        length = path.stat().st_size
        digest.update(f"{path.name}:{length}:".encode())
        with path.open("rb") as file:
            # a damaged length reads as far as the file goes, and no further than a header may
            header = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            digest.update(file.read(min(header, TOO_LARGE)))
            for part in range(16):
                file.seek(length * part // 16)
                digest.update(file.read(4096))
        size += length
    text = json.dumps(configs if pipeline else configs[0], sort_keys=True, ensure_ascii=False)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": digest.hexdigest(),
        "bytes": size,
        "commit": folder.name if folder.parent.name == "snapshots" else None,
    }
