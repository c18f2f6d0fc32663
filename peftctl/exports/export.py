"""The recipe block `export`: what is written at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftctl.config.block import Block, Positive


@dataclass(frozen=True, kw_only=True)
class Export(Block):
    """What `peftctl export` and `peftctl merge` write."""

    format: Literal["peft", "safetensors"] = "peft"
    """`peft`: the adapter folder; `safetensors`: the merged model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of merged weights; `auto`: that of the base's files."""

    into: Literal["base", "dequantised"] = "base"
    """What to merge into: the unquantised base, or the dequantised weights that were trained on."""

    shard_size: Positive = 5.0
    """Largest file of a merged model, in GB."""
