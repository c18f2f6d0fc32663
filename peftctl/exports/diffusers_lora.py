"""An adapter as diffusers' `load_lora_weights` reads it: `pytorch_lora_weights.safetensors` beside HF PEFT's files.

The scale alpha / r is multiplied into B, so that every reader finds the same update, whether it knows about alpha or
not; the metadata that newer ones read say alpha = r.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from peftctl.engine.disk import method_in
from peftctl.engine.method import Method
from peftctl.engine.peft_config import read_config
from peftctl.engine.tensor_file import PREFIX, WEIGHTS
from peftctl.methods.dora import DoRA
from peftctl.methods.lora import LoRA
from peftctl.training import filesystem

FILE = "pytorch_lora_weights.safetensors"

PARTS = {"UNet2DConditionModel": "unet", "SD3Transformer2DModel": "transformer"}
"""Networks whose pipelines have `load_lora_weights`, and what these call them."""

METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps the settings of the adapter, as a text of JSON."""


def readable(method: Method) -> bool:
    """Whether diffusers can read what `method` is on disk: LoRA and DoRA, with nothing trained beside."""
    plain = isinstance(method, LoRA) and method.bias == "none"
    return plain and not method.modules_to_save and not method.trainable_token_indices  # type: ignore[attr-defined]


def obstacle(method: Method, network: str) -> str | None:
    """Why diffusers will not read the adapter of a `network`, a class, and what to do; None where it will."""
    if network not in PARTS:
        return f"pipelines of a `{network}` have no `load_lora_weights`: peft reads the adapter, or `peftctl merge` it"
    if not readable(method):
        return "`load_lora_weights` of diffusers reads LoRA and DoRA alone: `peftctl merge` makes a pipeline of the run"
    return None


def write_lora(adapter: Path) -> bool:
    """Write the file for HF PEFT's folder `adapter`; False, and no file, where diffusers reads none of its kind.

    Raises AdapterError for a damaged folder, StorageError when the disk refuses.
    """
    from safetensors.torch import load_file, save

    base = read_config(adapter).get("auto_mapping")
    network = str(base.get("base_model_class")) if isinstance(base, dict) else ""
    if network not in PARTS or obstacle(method := method_in(adapter), network):
        return False
    part = PARTS[network]
    assert isinstance(method, LoRA)
    found = {key.removeprefix(PREFIX): value for key, value in load_file(adapter / WEIGHTS).items()}
    tensors = {}
    for name, value in found.items():
        site, _, leaf = name.rpartition(".lora_")
        scaled = value * method.scale(site) if leaf.startswith("B") else value
        tensors[f"{part}.{name}"] = scaled.contiguous()
    sites = sorted({name.rpartition(".lora_")[0] for name in found})
    ranks = {"^" + re.escape(site): method.rank(site) for site in sites if method.rank(site) != method.r}
    settings = {
        "r": method.r,
        "lora_alpha": method.r,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sites,
        "use_dora": isinstance(method, DoRA),
    }
    metadata = {METADATA: json.dumps({f"{part}.{key}": value for key, value in settings.items()}, sort_keys=True)}
    filesystem.write(adapter / FILE, [save(tensors, {"format": "pt", **metadata})])
    return True
