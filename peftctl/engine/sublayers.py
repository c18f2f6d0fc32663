"""The larger parts of a transformer, by name: its blocks, and where attention and feed-forward end.

block                 model.layers.3                       the stream goes in and comes out changed
attention's output    model.layers.3.self_attn.o_proj      the linear whose output joins the stream
feed-forward's output model.layers.3.mlp.down_proj         the same; a mixture of experts as a whole
feed-forward          model.layers.3.mlp                   the module around both of its linears
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from peftctl.engine.anatomy import ATTENTION, MLP, Site, ends_with, modules
from peftctl.engine.hosts import is_linear
from peftctl.errors import AdapterError

ATTENTION_OUTPUT = (
    *("o_proj", "out_proj", "o", "attention.output.dense", "attn.c_proj"),  # Llama, OPT, T5, BERT, GPT-2
    *("self_attention.dense", "attention.dense"),  # BLOOM, GPT-NeoX, Falcon
)
"""Those of `anatomy.ATTENTION` whose output joins the stream."""

MLP_OUTPUT = (
    *("down_proj", "wo", "output.dense", "fc2", "mlp.c_proj", "fc_out"),  # Llama, T5, BERT, ViT, GPT-2, GPT-J
    "dense_4h_to_h",  # BLOOM, GPT-NeoX, Falcon
)
"""Those of `anatomy.MLP` whose output joins the stream."""


def attention_outputs(model: nn.Module) -> list[str]:
    """The linears in which attention ends."""
    return [site.name for site in linears(model, ATTENTION_OUTPUT)]


def mlp_outputs(model: nn.Module) -> list[str]:
    """The linears in which the feed-forward of a block ends; the whole module where it is a mixture of experts."""
    experts = mixtures(model)
    attention = set(attention_outputs(model))  # BERT's `attention.output.dense` ends as its `output.dense` does
    ends = [site.name for site in linears(model, MLP_OUTPUT) if site.name not in attention]
    return [name for name in ends if not inside(name, experts)] + experts


def mlps(model: nn.Module) -> list[str]:
    """The modules that are a feed-forward, all of it and nothing else; not every architecture has them."""
    experts = mixtures(model)
    attention = [site.name for site in linears(model, ATTENTION)]
    parts = [site.name for site in linears(model, MLP) if site.name not in attention]
    around = dict.fromkeys(name.rpartition(".")[0] for name in mlp_outputs(model) if name not in experts)
    whole = [name for name in around if count(parts, name) > 1 and not count(attention, name)]
    return whole + experts


def blocks(model: nn.Module) -> list[Site]:
    """The blocks: the members of its lists of modules that lie in no other list."""
    lists = [site for site in modules(model) if isinstance(site.module, nn.ModuleList)]
    outermost = [site for site in lists if not inside(site.name, [other.name for other in lists if other != site])]
    return [Site(f"{site.name}.{key}", child) for site in outermost for key, child in site.module.named_children()]


def width(model: nn.Module) -> int:
    """The width of the stream between the blocks."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(size, int):
        raise AdapterError(f"{type(model).__name__}: its config says no `hidden_size`, the width of its blocks")
    return size


def changed(returned: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a block or a part of it returned, its hidden states changed: a tensor, or the first of a tuple."""
    return (change(returned[0]), *returned[1:]) if isinstance(returned, tuple) else change(returned)


def exactly(names: Iterable[str]) -> str:
    """A regular expression that matches these full names and no others."""
    return f"(?:{'|'.join(map(re.escape, names))})"


def linears(model: nn.Module, suffixes: Iterable[str]) -> list[Site]:
    """The linears of `model` that end in one of `suffixes`."""
    endings = tuple(suffixes)
    return [s for s in modules(model) if is_linear(s.module) and any(ends_with(s.name, ending) for ending in endings)]


def mixtures(model: nn.Module) -> list[str]:
    """The mixtures of experts: modules around experts whose weights are fused into 3-D parameters."""
    fused = [s.name for s in modules(model) if any(p.ndim == 3 for p in s.module.parameters(recurse=False))]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in fused if "expert" in name.rpartition(".")[2]))


def inside(name: str, others: Iterable[str]) -> bool:
    """Whether `name` lies below one of `others`."""
    return name.startswith(tuple(f"{other}." for other in others))


def count(names: Iterable[str], module: str) -> int:
    """How many of `names` lie below `module`."""
    return sum(inside(name, [module]) for name in names)
