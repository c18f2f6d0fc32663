"""The base model of a recipe: its block, and its loading from a folder, the hub or a .gguf file."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from peftctl.config.block import Block
from peftctl.errors import ModelError
from peftctl.models import dummy as dummies
from peftctl.models import quantization
from peftctl.models.device import choose_device, choose_dtype
from peftctl.models.folder import check_weights, fingerprint, read_config, weight_files
from peftctl.models.head import CAUSAL, DIFFUSION, PICTURES, Head, atop
from peftctl.models.kind import check_kind
from peftctl.models.quiet import Say, few, quiet, reason, silent
from peftctl.models.source import local, resolve
from peftctl.models.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Base", "Model", "fingerprint", "load", "load_tokenizer", "resolve"]


@dataclass(frozen=True, kw_only=True)
class Model(Block):
    """Which base model, and how it is held in memory."""

    name_or_path: str
    """A folder, a .gguf file or a hub id. What exists beside the recipe beats a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; its default branch when left out."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and computation. `auto`: bfloat16 where the device has it, else float32 (float16 on older GPUs)."""

    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Hold the frozen linear layers in 4 or 8 bits (bitsandbytes). `nf4` is QLoRA's; `type: qlora` sets it."""

    double_quantization: bool = True
    """4 bit only: quantise the scales as well, which saves 0.37 bits a weight."""

    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """How attention is computed. `auto`: the fastest that transformers finds for the model without extra packages."""

    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`: random weights of the true shapes instead of the model's own, nothing is downloaded: to measure speed
    and memory (`peftctl bench`)."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where it runs. `auto`: a CUDA GPU (one a process), else an Apple GPU, else the CPU."""


@dataclass(frozen=True)
class Base:
    """A base model ready for adapters."""

    model: PreTrainedModel
    """In eval mode; its parameters are not frozen yet."""

    tokenizer: PreTrainedTokenizerBase
    """As it came, with a pad token."""

    dtype: torch.dtype
    """Of the weights that are not quantised, and of the computation."""

    device: torch.device
    """Where the model is; meaningless when a `device_map` spread it."""

    folder: Path
    """Where its files are: the folder named, one of the hub's cache, or of the converted .gguf file."""

    name: str
    """How others can name it: the hub id, or the absolute path of the folder or .gguf file."""

    new: tuple[str, ...] = ()
    """Names of the modules that its files lack, which start from random numbers: the head of a classifier."""

    pipeline: Any = None
    """The pipeline of diffusers that `model` is the network of; None for models of transformers."""


def load_tokenizer(
    model: Model, root: Path = Path("."), say: Say = silent, *, head: Head = CAUSAL
) -> PreTrainedTokenizerBase:
    """The tokenizer alone, without the weights of a hub id; see `read_tokenizer` for what it guarantees.

    Raises:
        ModelError: no such model, no tokenizer, an unreadable one, or one without an end token.
    """
    if head is DIFFUSION:
        from peftctl.models.diffusion import load_words

        return load_words(model, root=root, say=say)
    folder = local(model.name_or_path, model.revision, root=root, weights=False, say=say)
    return read_tokenizer(folder, model.name_or_path, say, writes=not head.classifies and head is not PICTURES)


def load(
    model: Model,
    head: Head = CAUSAL,
    *,
    root: Path = Path("."),
    quantize: bool = True,
    device_map: Any = None,
    say: Say = silent,
) -> Base:
    """The base model with its tokenizer, its weights read once and straight to where they stay.

    Args:
        head: what kind of model it is loaded as.
        root: what a relative path is relative to.
        quantize: False gives the base as it was before quantisation, whatever the recipe says: for merging.
        device_map: transformers' own, where one device is not enough.
        say: hears the dtype and device chosen, downloads, conversions and odd tensors.

    Raises:
        ModelError: whatever is wrong with the model, the device or the quantisation asked for.
        StorageError: the disk refuses a download or a conversion.
    """
    if head is DIFFUSION:
        from peftctl.models.diffusion import load_pipeline

        return load_pipeline(model, root=root, say=say)
    place = model.name_or_path
    device = choose_device(model.device)
    _check_attention(model.attention, device)
    dtype = choose_dtype(model.dtype, device, say)
    dummy = model.load_format == "dummy"
    folder = local(place, model.revision, root=root, weights=not dummy, say=say)
    # the cheap looks come first: a mistake is told before gigabytes are read
    config = read_config(folder, place)
    if not dummy:
        check_kind(folder, config, check_weights(weight_files(folder, place), place), place, head)
    tokenizer = read_tokenizer(folder, place, say, writes=not head.classifies and head is not PICTURES)

    options: dict[str, Any] = {"device_map": {"": device} if device_map is None else device_map, **head.options()}
    if model.attention != "auto":
        options["attn_implementation"] = model.attention
    if quantize and model.quantization != "none":
        options["quantization_config"] = quantization.config(
            model.quantization,
            double=model.double_quantization,
            dtype=dtype,
            device=device,
            skip=head.kept_whole(config),
        )
        say(f"weights in {model.quantization}")
    if dummy:
        network, new = dummies.load(folder, head, dtype, device, options), tuple[str, ...]()
        say("random weights of the true shapes, as `load_format: dummy` asks")
    else:
        network, new = _read(folder, head, dtype, options, place, say)
    if head.classifies and network.config.pad_token_id is None:  # a decoder classifies at its last real token
        network.config.pad_token_id = tokenizer.pad_token_id
    quantization.keep_layout(network)
    if warning := quantization.misread_widths(network, device):
        say(f"warning: {warning}")
    if len(tokenizer) > (rows := network.get_input_embeddings().weight.shape[0]):
        raise ModelError(
            f"{place}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows",
            "copy the tokenizer from the original model",
        )
    name = str(resolve(place, root))
    network.config._name_or_path = network.name_or_path = name
    return Base(network, tokenizer, dtype, device, folder, name, new)


def _check_attention(attention: str, device: torch.device) -> None:
    if attention != "flash_attention_2":
        return
    if device.type != "cuda":
        raise ModelError(f"model.attention: `{attention}` needs a CUDA GPU; this is {device}", "set `attention: auto`")
    if importlib.util.find_spec("flash_attn") is None:  # without it transformers would fetch a kernel from the hub
        raise ModelError(
            f"model.attention: `{attention}` needs the package flash-attn",
            "`pip install flash-attn`, or set `attention: sdpa`",
        )


def _read(
    folder: Path, head: Head, dtype: torch.dtype, options: dict[str, Any], place: str, say: Say
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The network, and the names of the modules of a classifier that are new."""
    import transformers

    try:
        with quiet():
            network, report = getattr(transformers, head.auto).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below; transformers itself would only point at its log
                **options,
            )
    except Exception as error:  # foreign files and a foreign library: whatever it raises, the model is what is wrong
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
            hint = "set `quantization: nf4`, or take a smaller model"
            raise ModelError(f"{place}: does not fit the memory of this device", hint) from error
        raise ModelError(f"{place}: cannot be loaded: {reason(error)}") from error
    # transformers makes up what it does not find: a model with random layers, and a warning at most
    hint = "was it saved without its head, or do configuration and weights belong to different models?"
    own = _head_keys(network) if head.classifies else set()
    others = {key for key, *_ in report["mismatched_keys"]} & own
    new = {key for key in report["missing_keys"] if key in own} | others
    if new:
        say(f"new, starting from random numbers: {few(sorted(new))}")
    if missing := sorted(set(report["missing_keys"]) - new):
        raise ModelError(f"{place}: {len(missing)} tensors of the model are not in its files: {few(missing)}", hint)
    if mismatched := sorted(each for each in report["mismatched_keys"] if each[0] not in new):
        name, found, wanted = mismatched[0]
        shapes = f"`{name}` is {list(found)}, should be {list(wanted)}"
        raise ModelError(
            f"{place}: {len(mismatched)} tensors have another shape than `config.json` says: {shapes}", hint
        )
    if unused := sorted(report["unexpected_keys"]):
        say(f"{len(unused)} tensors in the files are no part of the model: {few(unused)}")
    model: PreTrainedModel = network.eval()
    others = set(network.state_dict()) - own
    return model, tuple(sorted({_outermost(key, others) for key in new}))


def _head_keys(network: PreTrainedModel) -> set[str]:
    """The parameters of what classifies."""
    return {name for name in network.state_dict() if atop(name, network.base_model_prefix)}


def _outermost(key: str, others: set[str]) -> str:
    """The outermost module that holds the tensor `key` and none of `others`."""
    parts = key.split(".")[:-1]
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((p for p in prefixes if not any(name.startswith(p + ".") for name in others)), ".".join(parts))
