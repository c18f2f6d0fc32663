"""Chosen parts trained whole: the last blocks, norms, heads, or modules by name.

Training only the last blocks is as old as fine-tuning (Howard and Ruder 2018, arXiv:1801.06146, section 3.3); norms
alone: Zhao et al. 2023, arXiv:2312.11420. No equation: a part computes what it did, with weights of its own.

The base stays as it was: every part is a copy in float32 that runs instead of it, in the dtype of its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from peftctl.config.block import Natural
from peftctl.config.quote import quoted
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import HEADS, Site, matched, modules, output_head, under
from peftctl.engine.method import Method, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.sublayers import blocks, exactly
from peftctl.engine.trained import Trained
from peftctl.errors import AdapterError

USUAL = 2
"""Blocks that are trained when nothing is chosen."""


@register
@dataclass(frozen=True, kw_only=True)
class Layers(Method):
    """Whole parts of the model, such as its last blocks: more to train than adapters, less than everything."""

    top: Natural | None = None
    """How many of the last blocks; 2 when nothing else is chosen either. Of a model with two stacks of blocks, those
    of the larger one: the decoder, the language model."""
    norms: bool = False
    """All normalisation layers."""
    heads: bool = False
    """What comes after the blocks: the output head, and heads for classification and question answering."""
    modules: str | list[str] = field(default_factory=list)
    """More modules: a list of names, or a regular expression over full names."""

    peft_type: ClassVar[str] = "LAYERS"
    learning_rate: ClassVar[float] = 5e-5
    paper: ClassVar[str] = "Howard and Ruder 2018, arXiv:1801.06146"
    merges: ClassVar[str] = "into any base, exactly: its weights take the place of the base's"

    def sites(self, model: nn.Module) -> list[Site]:
        whole = [site for site in modules(model) if site.name and any(True for _ in site.module.parameters())]
        found = self.named(model, whole)
        if self.norms:
            found |= chosen("norms", [s for s in whole if "norm" in type(s.module).__name__.lower()], model)
        if self.heads:
            found |= chosen("heads", [s for s in whole if is_head(s, model)], model)
        top = self.top if self.top is not None or found else USUAL
        if top:
            found |= last_blocks(model, top)
        if not found:
            raise AdapterError("method: nothing is chosen to be trained", "`top: 2`, `norms`, `heads` or `modules`")
        return outermost(site for site in whole if site.name in found)

    def named(self, model: nn.Module, whole: list[Site]) -> set[str]:
        """What `modules` names."""
        return matched(whole, self.modules, model, "method.modules") if self.modules else set()

    def adapter(self, site: Site) -> Adapter:
        return Trained(site.module, f"method: `{site.name}`")

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {"modules": sorted(adapters), "norms": self.norms, "heads": self.heads}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Layers:
        read = Reader(config, place)
        read.supported({}, {"modules", "norms", "heads"})
        names, norms, heads = read.names("modules"), read.flag("norms"), read.flag("heads")
        around = {key[:dot] for key in shapes for dot, letter in enumerate(key) if letter == "."}
        for name in names:
            if name not in around:
                read.wrong("modules", f"{quoted(name)} has no tensor in the file beside it")
        if not names:
            read.wrong("modules", "names no module")
        read.done()
        return cls(modules=exactly(sorted(names)), norms=norms, heads=heads)


def chosen(key: str, sites: list[Site], model: nn.Module) -> set[str]:
    """The names of `sites`; raises AdapterError when there are none."""
    if not sites:
        raise AdapterError(f"method.{key}: {type(model).__name__} has none that are known", "name them in `modules`")
    return {site.name for site in sites}


def is_head(site: Site, model: nn.Module) -> bool:
    """Whether `site` turns hidden states into what the model gives out."""
    return site.module is output_head(model) or any(under(site.name, entry) for entry in HEADS)


def last_blocks(model: nn.Module, top: int) -> set[str]:
    """The names of the last `top` blocks of the largest list of blocks."""
    lists: dict[str, list[Site]] = {}
    for site in blocks(model):
        lists.setdefault(site.name.rpartition(".")[0], []).append(site)
    if not lists:
        raise AdapterError(f"method.top: {type(model).__name__} has no list of blocks", "name its parts in `modules`")
    name, largest = max(lists.items(), key=lambda item: sum(size(site.module) for site in item[1]))
    if top > len(largest):
        raise AdapterError(f"method.top: {top} blocks, and `{name}` has {len(largest)}", "`type: full` trains all")
    return {site.name for site in largest[-top:]}


def size(module: nn.Module) -> int:
    """How many numbers `module` keeps; those of 4 bits count half."""
    return sum(p.numel() for p in module.parameters())


def outermost(sites: Iterable[Site]) -> list[Site]:
    """`sites` without those that lie inside another one, and without a module's second name."""
    kept: dict[int, Site] = {}
    for site in sites:  # in the order of the model: what lies around a module comes before it
        if not any(site.name.startswith(f"{other.name}.") for other in kept.values()):
            kept.setdefault(id(site.module), site)
    return list(kept.values())
