"""The recipe's model with what trains it attached, without content: every class is the real one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from peftctl.engine import hosts
from peftctl.engine.attach import attach
from peftctl.engine.method import Method
from peftctl.errors import ModelError
from peftctl.models.base import Model
from peftctl.models.device import choose_dtype
from peftctl.models.dummy import untie
from peftctl.models.head import Head
from peftctl.models.quiet import quiet
from peftctl.planning.quantised import quantise

PLAIN: Mapping[str, Mapping[Any, Any]] = {
    "init_weights": {"eva": "default", "loftq": "default"},
    "rank_allocation": {"gradient": "uniform"},
    "init": {"text": "random"},
}
"""Fields by which a method starts from content, and what takes as much memory and needs none."""


def planned_device(wanted: str) -> torch.device:
    """Where the run is to be: `cuda` need not be here."""
    if wanted != "auto":
        return torch.device(wanted)
    mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


def planned_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Of weights and computation; a GPU that is not here has bfloat16."""
    if wanted == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return choose_dtype(wanted, device) if wanted == "auto" else getattr(torch, wanted)


def network(model: Model, head: Head, config: Any, dtype: torch.dtype) -> Any:
    """The base as it is held in memory. Raises ModelError for an architecture that is no model of this kind."""
    import transformers
    from transformers.initialization import no_init_weights

    if not head.fits(config, config.architectures):
        raise ModelError(f"{model.name_or_path}: a `{config.model_type}` is no {head.what}")
    for key, value in head.options().items():
        setattr(config, key, value)
    options = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    with no_init_weights(), quiet():
        made = getattr(transformers, head.auto).from_config(config, dtype=dtype, **options)
        made.tie_weights()
    untie(made)
    if model.quantization != "none":
        quantise(made, packed_names(made, head, config), model.quantization, model.double_quantization)
    if head.classifies and config.pad_token_id is None:
        made.config.pad_token_id = 0
    made.name_or_path = made.config._name_or_path = model.name_or_path
    return made.eval()


def packed_names(made: Any, head: Head, config: Any) -> list[str]:
    """The linears that loading quantises: by transformers' own rules."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(made, head.kept_whole(config.to_dict()), made._keep_in_fp32_modules)
    return [
        name
        for name, module in made.named_modules()
        if (type(module) is nn.Linear or hosts.kind(module) == "Conv1D") and should_convert_module(name, kept)
    ]


def dressed(made: nn.Module, method: Method) -> Method:
    """Attach the method, as it starts where it looks at nothing; returns what is attached."""
    changes: dict[str, Any] = {"init_from": None}
    for name, instead in PLAIN.items():
        value = getattr(method, name, None)
        if isinstance(value, str) and value in instead:
            changes[name] = instead[value]
    if "init" in changes:
        changes["init_text"] = None
    known = {field.name for field in fields(method)}
    plain = replace(method, **{name: value for name, value in changes.items() if name in known})
    attach(made, plain)
    return plain
