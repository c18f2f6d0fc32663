"""Methods that can train biases beside their updates, as HF PEFT's `bias` says: of no module, of all, of some."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, modules
from peftctl.engine.method import Targeted
from peftctl.engine.trained import Bias


@dataclass(frozen=True, kw_only=True)
class Biased(Targeted):
    """With `bias: all` its last sites are the modules outside all others that end in adding a bias.

    The adapters of its own sites train the biases of their hosts themselves, unless `bias` is `none`.
    """

    bias: str = "none"
    """Biases trained beside the update: of no module, of all, or of the adapted ones, by the method's own word."""

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        return sites + self.other_biases(model, sites) if self.bias == "all" else sites

    def other_biases(self, model: nn.Module, taken: list[Site]) -> list[Site]:
        """Modules outside all of `taken` that end in adding a bias."""
        inside = tuple(f"{site.name}." for site in taken)
        return [s for s in modules(model) if hosts.ends_in_bias(s.module) and not f"{s.name}.".startswith(inside)]

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        own = {site.name for site in super().sites(model)}
        adapters = super().build(model, [site for site in sites if site.name in own])
        return adapters + [Bias(site.module) for site in sites if site.name not in own]
