"""A model without its weights, and which tensors of its files are which of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.engine.adapter import Stack
from peftctl.engine.anatomy import modules
from peftctl.errors import ModelError
from peftctl.exports.weights import Weights
from peftctl.models.folder import check_weights, read_config, weight_files
from peftctl.models.head import CAUSAL, Head
from peftctl.models.kind import check_kind
from peftctl.models.quiet import quiet, reason
from peftctl.models.tokenizer import read_tokenizer


def skeleton(folder: Path, place: str, head: Head = CAUSAL) -> nn.Module:
    """The model with `head` that `config.json` in `folder` describes, in eval mode, all parameters on `meta`.

    Buffers are real, so that it runs once it is given weights. Raises ModelError when it is no such model.
    """
    import transformers
    from accelerate import init_empty_weights

    check_kind(folder, read_config(folder, place), check_weights(weight_files(folder, place), place), place, head)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, **head.options()}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, **options)
            with init_empty_weights(include_buffers=False):
                auto = getattr(transformers, head.auto)
                model: Any = auto.from_config(config, trust_remote_code=False, dtype=torch.float32)
            model.tie_weights()  # what was empty was not tied
    except Exception as error:  # a foreign file: whatever the library raises, the file is what is wrong
        raise ModelError(f"{place}: cannot be built: {reason(error)}") from error
    if head.classifies and model.config.pad_token_id is None:  # as when it is loaded
        model.config.pad_token_id = read_tokenizer(folder, place, writes=False).pad_token_id
    built: nn.Module = model.eval()
    return built


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of the base model by name; tied ones under each of their names."""
    found: dict[str, Tensor] = {}
    for site, module in modules(model):
        unsaved = module._non_persistent_buffers_set
        own = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in unsaved}}
        found |= {f"{site}.{name}" if site else name: t for name, t in own.items() if t is not None}
    return found


def keys(model: nn.Module, weights: Weights) -> dict[str, str]:
    """The name in the files of every tensor of `model` that they hold, by its name in the model.

    Files may leave out the prefix of the model inside the model (`transformer.h.0...` of GPT-2), or have it where the
    model has none, and may have older names, which transformers knows. What a model merges or splits while it loads
    is left out.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = today(model, weights)
    found = {}
    for name in tensors(model):
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in weights.stored:
                found[name] = key
                break
        else:
            if name in renamed:
                found[name] = renamed[name]
    return found


def today(model: Any, weights: Weights) -> dict[str, str]:
    """The name in the files of what is stored under an older name, by what transformers calls it while it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps: Any = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    rest = renamings, converters, str(model.base_model_prefix), tensors(model)
    names = {key: rename_source_key(key, *rest) for key in weights.stored}
    return {name: key for key, (name, converter) in names.items() if converter is None and name != key}


def untie(model: nn.Module, weights: Weights) -> None:
    """Give what the files hold twice, with different values, a parameter each, as transformers does: T5's `lm_head`."""
    found, sources = keys(model, weights), set(getattr(model, "all_tied_weights_keys", {}).values())
    for group in tied(model):
        source, *others = sorted(group & found.keys(), key=lambda name: (name not in sources, name)) or [""]
        for name in others:
            if not torch.equal(weights.read(found[name]), weights.read(found[source])):
                site, _, leaf = name.rpartition(".")
                owner = model.get_submodule(site)
                owner._parameters[leaf] = nn.Parameter(torch.empty_like(getattr(owner, leaf)), requires_grad=False)


def tied(model: nn.Module) -> list[set[str]]:
    """Groups of names that share one parameter."""
    groups: dict[int, set[str]] = {}
    for name, tensor in tensors(model).items():
        groups.setdefault(id(tensor), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]


def ends(model: nn.Module) -> set[str]:
    """The names of the input embedding's and the output head's weight."""
    found = set()
    for which in ("input", "output"):
        end = getattr(model, f"get_{which}_embeddings")()
        found |= {f"{site}.weight" for site, module in modules(model) if module is end}
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of `model`, outermost first found, in order."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += list(child)
        elif not isinstance(child, Stack):
            found += blocks(child)
    return found
