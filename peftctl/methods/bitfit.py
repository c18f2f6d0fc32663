"""BitFit: only the biases are trained. Ben Zaken et al. 2021, arXiv:2106.10199.

y = W x + b        (section 3: the linears of attention and feed-forward, and the layer norms)

W [out, in] frozen, b [out] trained, from the base's own values. The base keeps its biases: what is trained is a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, in_layers, matched, modules, under
from peftctl.engine.hosts import ends_in_bias
from peftctl.engine.method import Targeted, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.trained import Bias
from peftctl.errors import AdapterError, Problem

WAY_OUT = "`type: ia3` trains as few parameters, `type: layers` with `norms: true` the norms"


@register
@dataclass(frozen=True, kw_only=True)
class BitFit(Targeted):
    """Biases alone: about one parameter in a thousand, in models that have them (BERT, GPT-2, ViT; not Llama)."""

    target_modules: str | list[str] = "all"
    """Modules of which the bias is trained: `all`, `all-linear`, `attention`, `mlp`, a list of names, or a regular
    expression over full names. Of those that a word or an expression names, modules without a bias are left out."""

    peft_type: ClassVar[str] = "BITFIT"
    learning_rate: ClassVar[float] = 1e-3
    paper: ClassVar[str] = "Ben Zaken et al. 2021, arXiv:2106.10199"
    merges: ClassVar[str] = "into any bias"

    def targets(self, model: nn.Module) -> list[Site]:
        biased = [site for site in modules(model) if site.name and ends_in_bias(site.module)]
        if not biased:
            raise AdapterError(f"method: {type(model).__name__} has no bias to train", WAY_OUT)
        wanted = {site.name for site in biased}
        if self.target_modules == "all":
            refuse_strange(model, {id(site.module.bias) for site in biased})
        else:
            wanted = matched(biased, self.target_modules, model, "method.target_modules")
        if self.exclude_modules:
            wanted -= matched(biased, self.exclude_modules, model, "method.exclude_modules")
        layers, pattern = self.layers_to_transform, self.layers_pattern
        found = [
            site
            for site in biased
            if site.name in wanted
            and in_layers(site.name, layers, pattern)
            and not any(under(site.name, entry) for entry in self.modules_to_save)
        ]
        if not found:
            text = f"method.target_modules: no bias of {type(model).__name__} is left to train"
            raise AdapterError(text, "look at `exclude_modules` and `layers_to_transform`")
        return found

    def adapter(self, site: Site) -> Adapter:
        return Bias(site.module)

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return self.placed(adapters, Bias)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> BitFit:
        read = Reader(config, place)
        read.supported({}, {"target_modules", "modules_to_save"})
        saved = read.saved(shapes)
        biases = [key.removesuffix(LEAF) for key in shapes if key.endswith(LEAF)]
        names = sorted(name for name in biases if not any(under(name, entry) for entry in saved))
        if not names:
            read.wrong("peft_type", "the tensor file beside it holds no biases")
        read.done()
        return cls(target_modules=names, modules_to_save=saved)


LEAF = ".bias"


def refuse_strange(model: nn.Module, known: set[int]) -> None:
    """Raise AdapterError for biases that their modules do not add at the end, so that no adapter could train them."""
    owners = [site for site in modules(model) if isinstance(site.module._parameters.get("bias"), nn.Parameter)]
    strange = [site for site in owners if id(site.module.bias) not in known]
    if strange:
        text, hint = "method.target_modules: `all`: `{}` is a {}, which may use its bias anywhere", "`all-linear`"
        raise AdapterError.of([Problem(text.format(site.name, type(site.module).__name__), hint) for site in strange])
