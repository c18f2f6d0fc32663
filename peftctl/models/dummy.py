"""A stand-in for a base model: random weights of its true shapes, so that a run can be measured without a download.

It has a folder with the configuration, and with the model's own tokenizer where that is here, else one of bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftctl.config.home import cache_home
from peftctl.errors import ModelError
from peftctl.models import tiny
from peftctl.models.architecture import architecture
from peftctl.models.head import Head
from peftctl.models.quiet import quiet
from peftctl.models.source import resolve

if TYPE_CHECKING:
    from peftctl.models.base import Model

BLOCK = 1 << 20
"""Random numbers that weights repeat: drawing each would take longer than training on them."""

SPREAD = 0.02
"""Their standard deviation, as most models start."""


def placed(model: Model) -> Model:
    """`model` under the path of its stand-in's folder, made where it is missing; as it is where it asks for none."""
    if model.load_format != "dummy":
        return model
    config = architecture(model.name_or_path, model.revision)
    with quiet():
        text = config.to_json_string(use_diff=False)
    words = tokenizer_folder(model)
    key = hashlib.sha256(f"{text} {words}".encode()).hexdigest()[:16]
    folder = cache_home() / "dummy" / f"{Path(model.name_or_path).name}-{key}"
    if not folder.is_dir():
        making = folder.with_name(f".{folder.name}.{id(config)}")
        making.mkdir(parents=True)
        write(config, words, making)
        try:
            making.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(making)
    return replace(model, name_or_path=str(folder), revision=None)


def tokenizer_folder(model: Model) -> Path | None:
    """Where the model's own tokenizer is, on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = resolve(model.name_or_path)
    if isinstance(found, Path):
        return found if (found / "tokenizer.json").is_file() else None
    cached = try_to_load_from_cache(found, "tokenizer.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def write(config: Any, words: Path | None, folder: Path) -> None:
    """The folder: configuration, tokenizer, and a weight file for whoever asks whether it is the same model."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    with quiet():
        config.save_pretrained(folder)
        made: Any = tiny.tokenizer() if words is None else AutoTokenizer.from_pretrained(words, local_files_only=True)
        made.save_pretrained(folder)
    save_file({"dummy": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, head: Head, dtype: torch.dtype, device: torch.device, options: dict[str, Any]) -> Any:
    """The network in eval mode. `options` are those of `from_pretrained`: labels, attention, quantisation."""
    import transformers
    from transformers.initialization import no_init_weights

    labels = {key: value for key, value in options.items() if key in ("num_labels", "id2label", "label2id")}
    attention = {key: value for key, value in options.items() if key == "attn_implementation"}
    quantization = options.get("quantization_config")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **labels)
    if not head.fits(config, config.architectures):
        raise ModelError(f"{folder}: a `{config.model_type}` is no {head.what}", f"choose one such as `{head.example}`")
    # memory that nobody has written to yet is not there yet: what is quantised is never there in full
    with no_init_weights(), quiet(), torch.device(device):
        network: Any = getattr(transformers, head.auto).from_config(config, dtype=dtype, **attention)
        network.tie_weights()
    untie(network)
    if quantization is not None:
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=network, dtype=dtype, device_map={"": device})
    with torch.no_grad():
        fill(network, dtype, device)
    return network.eval()


def untie(network: Any) -> None:
    """Give T5's kin the output head that some have in their files: transformers ties it where it finds none.

    Their configurations say so in another way once they are read; all of mT5's files have one.
    """
    config, head = network.config, network.get_output_embeddings()
    apart = config.model_type == "mt5" or getattr(config, "scale_decoder_outputs", True) is False
    if apart and isinstance(head, nn.Linear):
        head.weight = nn.Parameter(torch.empty_like(head.weight))


def fill(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Random matrices, scales of one, offsets of zero."""
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK, generator=generator) * SPREAD).to(dtype)
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if type(parameter).__name__ in ("Params4bit", "Int8Params"):
                module._parameters[name] = packed(parameter, block, dtype, device)
            elif parameter.is_meta:  # the bias of a quantised linear
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device), False)
            elif parameter.ndim > 1:
                tile(parameter, block)
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)


def tile(parameter: Tensor, block: Tensor) -> None:
    """Write `block` into `parameter`, over and over."""
    flat, block = parameter.view(-1), block.to(parameter)
    for start in range(0, len(flat), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])


def packed(parameter: Any, block: Tensor, dtype: torch.dtype, device: torch.device) -> Any:
    """A weight in 4 or 8 bits, as bitsandbytes makes it of one that is not."""
    full = torch.empty(parameter.shape, dtype=dtype, device=device)
    tile(full, block)
    kept = {key: value for key, value in vars(parameter).items() if not key.startswith("_") and key != "SCB"}
    for key in ("quant_state", "bnb_quantized", "CB"):
        kept.pop(key, None)
    return type(parameter)(full, requires_grad=False, **kept).to(device)
