"""Where the parts of a transformer are: from names in a recipe to modules of a model.

Target entries follow HF PEFT: a text is a regular expression over the full module name, an entry of a list is a
full name or its last dotted parts. `all-linear`, `attention` and `mlp` name the same parts in every architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from peftctl.config.bounds import TooMuch, bounded
from peftctl.config.near import did_you_mean
from peftctl.engine.adapter import Stack
from peftctl.engine.hosts import is_linear
from peftctl.errors import AdapterError, Problem

Targets = str | list[str]


class Site(NamedTuple):
    """One place a method attaches to; `name` is empty for the model itself."""

    name: str
    module: nn.Module


ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, Phi-3
    *("q", "k", "v", "o"),  # T5
    *("query", "key", "value", "attention.output.dense"),  # BERT, RoBERTa, ViT
    *("c_attn", "attn.c_proj"),  # GPT-2
    *("query_key_value", "self_attention.dense", "attention.dense"),  # BLOOM, GPT-NeoX, Falcon
    *("query_proj", "key_proj", "value_proj", "Wqkv", "attn.out_proj"),  # DeBERTa, MPT
    *("to_q", "to_k", "to_v", "to_out.0"),  # UNets and DiTs of diffusers
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # texts in Stable Diffusion 3
)
MLP = (
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),  # Llama and its kin
    *("wi", "wi_0", "wi_1", "wo"),  # T5
    *("intermediate.dense", "output.dense", "fc1", "fc2"),  # BERT, ViT, OPT, BART
    *("c_fc", "mlp.c_proj", "fc_in", "fc_out"),  # GPT-2, GPT-J
    *("dense_h_to_4h", "dense_4h_to_h"),  # BLOOM, GPT-NeoX, Falcon
    *("net.0.proj", "net.2"),  # UNets and DiTs of diffusers
)
HEADS = ("score", "classifier", "qa_outputs")
"""Heads that HF puts on a model for classification and question answering: trained whole, never adapted."""
EFFORT = (1.0, 512)
"""Seconds and megabytes for a regular expression over the names of a model: some take forever for a few letters."""

BLOCK = re.compile(r"(?:^|\.)[^.]*\.(\d+)\.")


def modules(model: nn.Module, prefix: str = "") -> Iterator[Site]:
    """Every module of the base model with its full name; what adapters consist of is left out."""
    yield Site(prefix, model)
    for name, child in model.named_children():
        if not isinstance(child, Stack):
            yield from modules(child, f"{prefix}.{name}" if prefix else name)


def has_decoder(model: nn.Module) -> bool:
    """Whether `model` is an encoder with a decoder behind it."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def ends_with(name: str, entry: str) -> bool:
    """Whether `entry` is `name` or its last dotted parts."""
    return name == entry or name.endswith("." + entry)


def under(name: str, entry: str) -> bool:
    """Whether `name` is the module `entry` or lies inside it."""
    return f".{entry}." in f".{name}."


def find(
    model: nn.Module,
    targets: Targets,
    *,
    exclude: Targets | None = None,
    layers: int | list[int] | None = None,
    layers_pattern: str | list[str] | None = None,
    saved: list[str] | None = None,
    adapts: tuple[type[nn.Module], ...] = (nn.Embedding,),
) -> list[Site]:
    """The linears, and modules of the classes `adapts`, that `targets` names, in the order of the model.

    `layers` keeps only the numbered blocks given, `saved` are modules trained whole and therefore not adapted.
    Raises AdapterError when an entry matches nothing, with near names, or matches what cannot carry an adapter.
    """
    everything = [site for site in modules(model) if site.name]
    skipped = matched(everything, exclude, model, "method.exclude_modules") if exclude else set()
    wanted = matched(everything, targets, model, "method.target_modules")
    found = [
        site
        for site in everything
        if site.name in wanted
        and site.name not in skipped
        and not any(under(site.name, entry) for entry in saved or ())
        and in_layers(site.name, layers, layers_pattern)
    ]
    if not found:
        raise AdapterError(
            f"method.target_modules: no module of {type(model).__name__} is left to adapt",
            "look at `exclude_modules` and `layers_to_transform`",
        )
    misfits = [site for site in found if not (is_linear(site.module) or isinstance(site.module, adapts))]
    if misfits:
        raise AdapterError.of(
            [
                Problem(
                    f"method.target_modules: `{site.name}` is a {type(site.module).__name__}, {no(adapts)}",
                    "name the linears inside it, or use `all-linear`",
                )
                for site in misfits
            ]
        )
    return found


def no(adapts: tuple[type[nn.Module], ...]) -> str:
    """What a module is not that is neither a linear nor one of `adapts`."""
    words = ["linear", *("embedding" if cls is nn.Embedding else cls.__name__ for cls in adapts)]
    return f"no {' or '.join(words)}"


def matched(sites: list[Site], targets: Targets, model: nn.Module, place: str) -> set[str]:
    """Names of the modules that `targets` matches; every entry must match at least one."""
    if isinstance(targets, str):
        names = shorthand(sites, targets, model)
        if names is None:
            names = fullmatches(targets, [site.name for site in sites], place)
        if not names:
            raise AdapterError(
                f"{place}: `{targets}` matches no module of {type(model).__name__}", hint(sites, targets)
            )
        return names
    by_entry = {entry: {site.name for site in sites if ends_with(site.name, entry)} for entry in targets}
    unmatched = [entry for entry, names in by_entry.items() if not names]
    if unmatched:
        text = f"{place}: `{{}}` matches no module of {type(model).__name__}"
        raise AdapterError.of([Problem(text.format(entry), hint(sites, entry)) for entry in unmatched])
    return set().union(*by_entry.values())


def shorthand(sites: list[Site], target: str, model: nn.Module) -> set[str] | None:
    """What `all-linear`, `attention` and `mlp` stand for in `model`; None when `target` is none of them."""
    linears = [site for site in sites if is_linear(site.module)]
    if target.lower() == "all-linear":
        head = output_head(model)
        return {s.name for s in linears if s.module is not head and not any(under(s.name, entry) for entry in HEADS)}
    for word, suffixes in (("attention", ATTENTION), ("mlp", MLP)):
        if target == word:
            names = {site.name for site in linears if any(ends_with(site.name, s) for s in suffixes)}
            return names - shorthand(sites, "attention", model) if word == "mlp" else names  # type: ignore[operator]
    return None


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits; None for a model without one.

    A model that writes about pictures may have it in the model inside that writes.
    """
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    found = (getter() for getter in getters if getter is not None)
    return next((head for head in found if head is not None), None)


def fullmatches(pattern: str, names: list[str], place: str) -> set[str]:
    """Those of `names` that the regular expression matches whole; one that takes too long is refused."""
    try:
        with bounded(*EFFORT):
            return {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise AdapterError(f"{place}: `{pattern}` is no regular expression: {error}") from None
    except TooMuch as error:
        raise AdapterError(f"{place}: `{pattern}` cannot be matched: {error}", "list the names instead") from None


def in_layers(name: str, layers: int | list[int] | None, pattern: str | list[str] | None) -> bool:
    """Whether the numbered block that `name` lies in is one of `layers`, by HF PEFT's rules."""
    if layers is None:
        return True
    if pattern:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        found = next(filter(None, (re.match(rf"(?:.*\.)?{p}\.(\d+)\.", name) for p in patterns)), None)
    else:
        found = BLOCK.search(name)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def hint(sites: list[Site], entry: str) -> str:
    """What the author of an unmatched entry probably meant."""
    if any("expert" in site.name and p.ndim == 3 for site in sites for p in site.module.parameters(recurse=False)):
        fused = "the experts of this model are fused 3-D parameters, not linears; adapt its attention instead"
        if entry.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "mlp"):
            return fused
    leaves = sorted({site.name.rpartition(".")[2] for site in sites if is_linear(site.module)})
    return did_you_mean(entry, leaves) or f"linears of this model: {', '.join(f'`{leaf}`' for leaf in leaves)}"
