"""(IA)3: keys, values and feed-forward activations times learned vectors. Liu et al. 2022, arXiv:2205.05638.

y = l o (W x + b)      at keys and values: softmax(q (l_k o K)^T / sqrt(d)) (l_v o V)    (section 3.3)
y = W (l o x) + b      at the output of the feed-forward: W_2 (l_ff o gamma(W_1 x))

W [out, in] and b [out] frozen; l [out] at keys and values, [in] at the feed-forward. l starts at one, so training
starts from the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, ends_with, fullmatches
from peftctl.engine.method import Targeted, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.sublayers import exactly, linears, mlp_outputs
from peftctl.engine.trained import Trained
from peftctl.errors import AdapterError, Problem

KEYS_AND_VALUES = (
    *("k_proj", "v_proj", "k", "v", "key", "value"),  # Llama, ViT, T5, BERT
    *("key_proj", "value_proj"),  # DeBERTa
    *("qkv_proj", "c_attn", "query_key_value", "Wqkv"),  # Phi-3, GPT-2, GPT-NeoX, MPT: the queries come along
)


class Rescaled(Adapter):
    """What the two forms below share. The product is one of float32: bfloat16 knows no number from 1 to 1.0078."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(shape))

    def times(self, x: Tensor) -> Tensor:
        """l o x, in the dtype of `x`."""
        return (x * self.ia3_l.flatten()).to(x.dtype)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name != "weight":
            return value
        return hosts.stored(self.host, (hosts.stored(self.host, value) * self.factors(value)).to(value))

    def factors(self, value: Tensor) -> Tensor:
        """l as it is kept, where `value` is."""
        return self.ia3_l.detach().to(value.device)


class RescaledOutput(Rescaled):
    """x [..., in] -> y [..., out]; ia3_l [out, 1] multiplies the output, with its bias."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(hosts.features(host)[1], 1)

    def forward(self, base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return self.times(base(*args, **kwargs))

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name == "bias":
            return (value * self.factors(value).flatten()).to(value)
        return super().merged(value, name)


class RescaledInput(Rescaled):
    """x [..., in] -> y [..., out]; ia3_l [1, in] multiplies the input."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(1, hosts.features(host)[0])

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return base(self.times(x), *args, **kwargs)


@register
@dataclass(frozen=True, kw_only=True)
class IA3(Targeted):
    """Learned vectors that multiply activations: about one parameter in ten thousand, for small data sets."""

    target_modules: str | list[str] = "auto"
    """`auto` (keys, values and the output of the feed-forward, in every architecture), `all-linear`, `attention`,
    `mlp`, a list of names, or a regular expression over full names."""
    feedforward_modules: str | list[str] = "auto"
    """Targets of which the input is multiplied instead of the output: `auto` (the output of the feed-forward), a list
    of names, or a regular expression over full names."""

    peft_type: ClassVar[str] = "IA3"
    learning_rate: ClassVar[float] = 5e-3
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"
    adapts = ()

    def targets(self, model: nn.Module) -> list[Site]:
        if self.target_modules != "auto":
            return super().targets(model)
        names = [site.name for site in linears(model, KEYS_AND_VALUES)] + outputs(model)
        if not names:
            hint = "name `target_modules`, and `feedforward_modules` among them"
            what = f"`auto` knows no keys and values of {type(model).__name__}"
            raise AdapterError(f"method.target_modules: {what}", hint)
        return replace(self, target_modules=exactly(names)).targets(model)

    def feedforward(self, model: nn.Module, targets: list[Site]) -> set[str]:
        """Names of the targets of which the input is multiplied."""
        if self.feedforward_modules == "auto":
            return set(outputs(model)) & {site.name for site in targets}
        place, entries = "method.feedforward_modules", self.feedforward_modules
        if isinstance(entries, str):
            found = {entries: fullmatches(entries, [site.name for site in targets], place)}
        else:
            found = {entry: {site.name for site in targets if ends_with(site.name, entry)} for entry in entries}
        if missing := [entry for entry, names in found.items() if not names]:
            leaves = sorted({site.name.rpartition(".")[2] for site in targets})
            hint = f"targets: {', '.join(f'`{leaf}`' for leaf in leaves)}"
            raise AdapterError.of([Problem(f"{place}: `{entry}` matches no target module", hint) for entry in missing])
        return set().union(*found.values())

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        targets = self.targets(model)
        around: dict[str, Callable[[nn.Module], Adapter]] = {site.name: RescaledOutput for site in targets}
        around |= dict.fromkeys(self.feedforward(model, targets), RescaledInput)
        return [around.get(site.name, Trained)(site.module) for site in sites]

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        placed = self.placed(adapters, Rescaled)
        names = placed["target_modules"]
        return (
            DEFAULTS
            | placed
            | {
                "feedforward_modules": [name for name in names if isinstance(adapters[name], RescaledInput)],
                "fan_in_fan_out": hosts.any_conv1d(adapters[name].host for name in names),
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> IA3:
        read = Reader(config, place)
        # where the vectors sit, and on which side of a module, is read from their shapes
        read.supported(DEFAULTS, set(DEFAULTS))
        saved = read.saved(shapes)
        vectors = read.sites(shapes, LEAF, "(IA)3")
        read.done()
        inputs = sorted(name for name, shape in vectors.items() if shape[:1] == (1,))
        return cls(
            target_modules=sorted(vectors),
            feedforward_modules=exactly(inputs) if inputs else [],
            modules_to_save=saved,
        )


def outputs(model: nn.Module) -> list[str]:
    """The linears in which a feed-forward ends; experts that are fused into 3-D parameters have none."""
    return [name for name in mlp_outputs(model) if hosts.is_linear(model.get_submodule(name))]


LEAF = ".ia3_l"

DEFAULTS: dict[str, Any] = {
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "feedforward_modules": None,
    "init_ia3_weights": True,
    "modules_to_save": None,
    "target_modules": None,
}
"""IA3Config's own keys with its defaults."""
