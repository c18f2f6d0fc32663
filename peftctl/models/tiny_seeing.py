"""Models that read pictures, made tiny as `tiny.py` makes others: both halves small, pictures of a few patches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SIDE, PATCH = 32, 8
"""Pixels of a side of what it sees, and of a patch of it."""


def halves(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names of the configurations inside that of a model that reads pictures; empty for other models."""
    inside = ("vision_config", "text_config") if hasattr(config, "vision_config") else ("encoder", "decoder")
    found = tuple(name for name in inside if hasattr(getattr(config, name, None), "to_dict"))
    return found if found and hasattr(getattr(config, found[0]), "image_size") else ()


def joined(config: PreTrainedConfig, small: dict[str, PreTrainedConfig], top: PreTrainedConfig | None) -> Any:
    """The configuration of the tiny model out of its `small` halves; `top` where the text's is the whole one."""
    raw = (top or config).to_dict()
    for name, half in small.items():
        raw[name] = half.to_dict()
    seeing = raw[next(iter(small))]
    seeing |= {"image_size": SIDE, "patch_size": PATCH}
    width = seeing["hidden_size"]
    if "text_config" in small:
        raw["text_config"] |= {"encoder_hidden_size": width, "is_decoder": True, "projection_dim": width}
        raw["text_config"]["sep_token_id"] = raw["text_config"]["eos_token_id"]
        raw |= {"image_text_hidden_size": width, "projection_dim": width}
    if "decoder" in small:
        raw |= {key: raw["decoder"][key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        raw["decoder_start_token_id"] = raw["decoder"]["bos_token_id"]
    return type(config).from_dict(raw)


def write_processor(folder: Path) -> None:
    """What makes pixels for it."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
