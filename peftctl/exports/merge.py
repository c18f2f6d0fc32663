"""An adapter written into the weights of its base: tensor by tensor, in a folder that plain transformers loads.

    W' = merged(W)        into the 16- or 32-bit base
    W' = merged(dq(q(W))) into what was trained on, when the base was held in 4 or 8 bits (`dequantised`)

The base is read and written as a stream; only the adapter and one file's worth of tensors are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import output_head
from peftctl.engine.attach import stacks
from peftctl.engine.disk import WEIGHTS
from peftctl.engine.hosts import is_linear, stored
from peftctl.errors import AdapterError, ModelError, NonFiniteError, Problem
from peftctl.exports.tensors import Source, write_shards
from peftctl.methods import load
from peftctl.models.folder import read_config
from peftctl.models.quantization import bitsandbytes
from peftctl.models.quiet import quiet, reason

REPORT = "merge_report.json"
TRAVELS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""What goes with the weights: configuration, tokenizer, chat template, generation settings."""

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantised:
    """How the base was held while training, for `into: dequantised`."""

    kind: str
    """nf4, fp4 or int8."""
    double: bool
    dtype: torch.dtype
    """Of the weights when they were quantised."""


@dataclass
class Merge:
    """What a merge did, tensor by tensor."""

    adapter_sha256: str
    changed: dict[str, float] = field(default_factory=dict)
    """Tensor -> relative size of its change, |W' - W| / |W|."""
    unchanged: list[str] = field(default_factory=list)
    """Tensors that an adapter stands on and that kept every bit: an update too small for their dtype, or zero."""
    untied: bool = False
    """Whether embedding and output head had one weight before and have two now."""
    bytes: int = 0


@torch.no_grad()
def merge_into(
    folder: Path,
    base: Path,
    adapter: Path,
    *,
    dtype: torch.dtype | None = None,
    quantised: Quantised | None = None,
    shard_size: float = 5e9,
    tick: Tick = lambda done, total: None,
) -> Merge:
    """Write the base in the folder `base`, with the adapter in it, into `folder`, which exists and is empty.

    `dtype` is that of the result, the base's own when None; `quantised` merges into what was trained on; `tick` hears
    how many tensors are done, and may raise to stop.

    Raises AdapterError for an adapter of another base or one that is in this base already, NotMergeable for a method
    that no weight can express, StorageError when the disk refuses. What then lies in `folder` is not a model.
    """
    done = Merge(digest(adapter / WEIGHTS))
    refuse_twice(base, done)
    skeleton = outline(base)
    load(skeleton, adapter)
    source = Source(base, str(base))
    places = located(skeleton, source)
    quantisers = quantised_names(skeleton, source) if quantised else {}

    def stream() -> Iterator[tuple[str, Tensor]]:
        total = len(source.files) + len(places.extra)
        for number, name in enumerate([*source, *places.extra], start=1):
            tensor = source[places.extra.get(name, name)]
            if quantised and name in quantisers:
                tensor = requantised(tensor, quantisers[name], quantised)
            new = apply(tensor, name, places.hosts.get(name, []), done)
            yield name, new.to(dtype) if dtype is not None and new.is_floating_point() else new
            tick(number, total)

    done.bytes = write_shards(folder, stream(), shard_size)
    done.untied = places.untied
    copy_beside(base, adapter, folder, dtype, done)
    return done


def apply(tensor: Tensor, name: str, hosts: list[tuple[Adapter, str]], done: Merge) -> Tensor:
    """A tensor of the base after every adapter on it; `done` learns how much it changed."""
    new = tensor
    for adapter, parameter in hosts:
        new = adapter.merged(new, parameter)
    if new is tensor:
        return tensor
    if not bool(new.isfinite().all()):
        raise NonFiniteError(f"`{name}`: the merged weight is not finite", "the adapter, or the base, is damaged")
    if torch.equal(new, tensor):
        done.unchanged.append(name)
    else:
        done.changed[name] = float((new.float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-30))
    return new


@dataclass
class Places:
    """Where the tensors of the files stand in the model."""

    hosts: dict[str, list[tuple[Adapter, str]]]
    """Tensor name -> the adapters on it, each with the parameter's name below its host."""
    extra: dict[str, str]
    """Tensors that the files lack because they were tied -> the one that they were tied to."""
    untied: bool


def located(model: nn.Module, source: Source) -> Places:
    """Find the tensor in the files of every parameter that an adapter of `model` changes."""
    places = Places({}, {}, untied=False)
    tied = tied_names(model)
    missing = []
    for site, host, stack in stacks(model):
        for parameter, _ in host.named_parameters():
            if parameter.startswith("adapters."):
                continue
            full = f"{site}.{parameter}" if site else parameter
            name = in_files(full, model, source)
            if name is None and full in tied:
                twin = next((n for other in tied if (n := in_files(other, model, source))), None)
                if twin is not None:
                    places.extra[full] = twin
                    name = full
            if name is None:
                missing.append(
                    Problem(f"`{full}`: not in the files of the base", "another base than it was trained on?")
                )
                continue
            if full in tied:
                places.untied = True
            for adapter in stack.values():
                places.hosts.setdefault(name, []).append((adapter, parameter))  # type: ignore[arg-type]
    if missing:
        raise AdapterError.of(missing)
    if places.untied:  # each end now needs a tensor of its own
        for full in tied:
            if full not in places.extra and in_files(full, model, source) is None:
                places.extra[full] = next(n for other in tied if (n := in_files(other, model, source)))
    return places


def in_files(name: str, model: nn.Module, source: Source) -> str | None:
    """The name in the files of the parameter `name`: the same, or with or without the prefix of the base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((candidate for candidate in candidates if candidate in source), None)


def tied_names(model: nn.Module) -> set[str]:
    """Full names of the input embedding's and the output head's weight, when the two are one; else empty."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    ends = [model.get_input_embeddings(), output_head(model)]  # type: ignore[operator]
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is end for end in ends)}


def quantised_names(model: nn.Module, source: Source) -> dict[str, nn.Module]:
    """The tensors in the files that a quantised load holds in 4 or 8 bits: every linear but the output head."""
    head = output_head(model)
    linears = {name: m for name, m in model.named_modules() if is_linear(m) and m is not head}
    names = {in_files(f"{name}.weight", model, source): module for name, module in linears.items()}
    return {name: module for name, module in names.items() if name is not None}


def requantised(tensor: Tensor, host: nn.Module, how: Quantised) -> Tensor:
    """A weight as it was in training: rounded to 4 or 8 bits and back."""
    functional = bitsandbytes().functional
    matrix = stored(host, tensor.to(how.dtype)).contiguous()
    if how.kind == "int8":
        rows, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
        back = functional.int8_vectorwise_dequant(rows, scales)
    else:
        packed, state = functional.quantize_4bit(matrix, quant_type=how.kind, compress_statistics=how.double)
        back = functional.dequantize_4bit(packed, state)
    return stored(host, back).contiguous().to(tensor.dtype)


def outline(base: Path) -> nn.Module:
    """The model of the folder `base` without weights. Raises ModelError when it cannot be built."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if read_config(base, str(base)).get("quantization_config"):
        raise ModelError(f"{base}: its weights are quantised on disk", "merge into the unquantised base")
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            model: nn.Module = AutoModelForCausalLM.from_config(config)
            return model
    except Exception as error:  # a foreign config and a foreign library: whatever it raises, the model is what is wrong
        raise ModelError(f"{base}: cannot be built: {reason(error)}") from error


def refuse_twice(base: Path, done: Merge) -> None:
    """Raise AdapterError when the base is a merge of this very adapter."""
    report = base / REPORT
    if report.is_file() and json.loads(report.read_bytes()).get("adapter_sha256") == done.adapter_sha256:
        raise AdapterError(f"{base}: this adapter is merged into it already", "merge into the model before that")


def digest(file: Path) -> str:
    """SHA-256 of a file. Raises AdapterError when it is not there."""
    if not file.is_file():
        raise AdapterError(f"{file}: missing")
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def copy_beside(base: Path, adapter: Path, folder: Path, dtype: torch.dtype | None, done: Merge) -> None:
    """Configuration, tokenizer, chat template and generation settings, beside the merged weights."""
    for pattern in TRAVELS:
        for file in base.glob(pattern):
            if file.name not in (REPORT, "config.json") and not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_bytes())
    config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if done.untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (adapter / "chat_template.jinja").is_file():
        shutil.copyfile(adapter / "chat_template.jinja", folder / "chat_template.jinja")
