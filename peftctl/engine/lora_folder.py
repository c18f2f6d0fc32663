"""LoRA folders in HF PEFT's format: what a stranger's adapter_config.json and tensor shapes say together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftctl.config.quote import quoted
from peftctl.engine.patterns import by_pattern
from peftctl.engine.peft_config import LORA, LORA_CHANGES_BASE, Reader
from peftctl.engine.token_rows import read_indices

LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}
"""`loftq_config` of an adapter that fits its quantised base alone. Beside `init_lora_weights: true` HF PEFT does
nothing with it; it removes the key from adapters of its own that are not such."""

A_LEAVES = (".lora_A.weight", ".lora_embedding_A")

UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "trainable_token_indices"),
    # where the adapter sits is read from its tensors; these say the same in other words
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    # of interest while training only, or meaningless here
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("megatron_config", "megatron_core"),
}


def read_lora(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> dict[str, Any]:
    """The fields of the LoRA in a folder; arguments and errors as those of `Method.from_peft`."""
    read = Reader(config, place)
    read.supported(LORA, UNDERSTOOD)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(LORA_CHANGES_BASE):
        hint = "save it from PEFT with `path_initial_model_for_weight_conversion`"
        read.wrong("init_lora_weights", f"{quoted(init)} makes the adapter one for a changed base", hint)
    sites = read.sites(shapes, A_LEAVES, "LoRA")
    ranks = {name: shape[0] if shape else 0 for name, shape in sites.items()}
    r, alpha = read.count("r", LORA["r"]), read.number("lora_alpha", LORA["lora_alpha"])
    dropout, use_rslora = read.number("lora_dropout", 0.0, most=1), read.flag("use_rslora")
    bias, saved = read.choice("bias", ("none", "all", "lora_only")), read.saved(shapes)
    pattern, alpha_pattern = read.patterns("rank_pattern", ranks), read.patterns("alpha_pattern", ranks)
    tokens = read_indices(read)
    read.done()
    read.same_ranks(sites, lambda name: by_pattern(pattern, name, r))
    read.done()
    alphas = {name: by_pattern(alpha_pattern, name, alpha) for name in ranks}
    started = {"init_weights": "loftq", "init_from": str(Path(place).parent)} if config.get("loftq_config") else {}
    return started | {
        "r": r,
        "alpha": alpha,
        "dropout": dropout,
        "use_rslora": use_rslora,
        "bias": bias,
        "target_modules": sorted(ranks),
        "trainable_token_indices": tokens,
        "modules_to_save": saved,
        "rank_pattern": {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {"^" + re.escape(name): value for name, value in alphas.items() if value != alpha},
    }
