"""Models that write about pictures, each in its own way: BLIP, GIT, and an encoder of pictures with any decoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.engine.inputs import evaluating


def eyes(model: nn.Module) -> list[str]:
    """The names of the outermost parts that read pictures."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and getattr(module, "main_input_name", None) == "pixel_values":
            found.append(name)
    return found


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [rows, tokens, vocabulary] at each token of `input_ids`, of what follows it.

    `batch` without `pixel_values` has no rows: the model sees gray ones.
    """
    network: Any = getattr(model, "module", model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pixels = batch.get("pixel_values")
    if pixels is None:
        pixels = torch.zeros(len(ids), 3, *size_of(network), device=ids.device)
    pixels = pixels.to(network.dtype)
    if network.config.is_encoder_decoder:
        logits: Tensor = model(pixel_values=pixels, decoder_input_ids=ids, decoder_attention_mask=mask).logits
    else:
        whole: dict[str, Any] = {"pixel_values": pixels, "input_ids": begun(network, ids), "attention_mask": mask}
        if "use_cache" in inspect.signature(network.forward).parameters:
            whole["use_cache"] = False  # GIT's cache would be filled twice where activations are computed again
        logits = model(**whole).logits
    return logits[:, -ids.shape[1] :]  # some have logits for the picture, before those of the text


def begun(network: Any, ids: Tensor) -> Tensor:
    """The ids as generation begins them: BLIP's has a token of its own in the first place."""
    start = getattr(getattr(network.config, "text_config", None), "bos_token_id", None)
    if network.config.model_type != "blip" or start is None:
        return ids
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], dim=1)


def size_of(network: Any) -> tuple[int, int]:
    """Height and width of the pictures that a model sees."""
    config = getattr(network.config, "vision_config", None) or network.config.encoder
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def drawn_from(
    model: nn.Module, pixels: Tensor, prompt: Sequence[int], max_new_tokens: int, end: int, **how: Any
) -> Tensor:
    """The ids that `model` writes about each picture behind `prompt`, greedily unless `how` says otherwise."""
    network: Any = model
    ids = torch.tensor([list(prompt)] * len(pixels), device=network.device)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens} | how
    pixels = pixels.to(network.device, network.dtype)
    with evaluating(model):
        if network.config.model_type == "blip":  # it drops the last token of what it is given: the end of a text
            closed = torch.cat([ids, torch.full_like(ids[:, :1], end)], dim=1)
            mask = torch.ones_like(closed)
            out = network.generate(pixel_values=pixels, input_ids=closed, attention_mask=mask, **options)
        elif network.config.is_encoder_decoder:
            out = network.generate(pixel_values=pixels, decoder_input_ids=ids, eos_token_id=end, **options)
        else:
            out = network.generate(pixel_values=pixels, input_ids=ids, eos_token_id=end, **options)
    written: Tensor = out[:, len(prompt) :]
    return written
