"""Bottleneck adapters: small networks after, or beside, the sub-layers. Houlsby et al. 2019, arXiv:1902.00751.

h' = h + s U f(D h)      after a sub-layer, before its output joins the stream (fig. 2)
h' = h + s U f(D x)      `parallel`: beside it, from the same input (He et al. 2021, arXiv:2110.04366, table 1)

h [d] what the sub-layer returns, x [d] what it was given, D [w, d] and U [d, w] with biases [w] and [d], s the scale,
w = d / reduction_factor. U starts at zero, so training starts from the base model.

`houlsby` puts one after attention and one after the feed-forward, `pfeiffer` after the feed-forward only (Pfeiffer et
al. 2020, arXiv:2005.00247, who found it as good), `parallel` beside the feed-forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import Count, Positive, Probability
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Linear
from peftctl.engine.anatomy import Site
from peftctl.engine.method import Targeted, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.sublayers import attention_outputs, changed, exactly, mlp_outputs, mlps, width
from peftctl.engine.trained import Trained
from peftctl.errors import AdapterError

NonLinearity = Literal["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "mish"]
"""Names in `torch.nn.functional`."""

Variant = Literal["pfeiffer", "houlsby", "parallel"]


class Waist(nn.Module):
    """x [..., in] -> s U f(D x) [..., out]: down to the waist w and up again."""

    def __init__(
        self, features: tuple[int, int], waist: int, non_linearity: NonLinearity, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.non_linearity: Callable[[Tensor], Tensor] = getattr(F, non_linearity)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.down = Linear(features[0], waist)
        self.up = Linear(waist, features[1])

    def start(self, init: Literal["zero", "normal"]) -> None:
        """Draw the start: U at zero, or both so small that it is nearly the identity."""
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        else:
            for linear in (self.down, self.up):
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)  # Houlsby et al., section 3.6

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.non_linearity(self.down(self.dropout(x))))
        return self.scale * y


class After(Adapter):
    """... -> h' [..., d] = h + s U f(D h), h what the host returns, or the first of it."""

    def __init__(self, bottleneck: Waist) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return changed(base(*args, **kwargs), lambda h: h + self.bottleneck(h))


class Beside(After):
    """x [..., d] -> h' [..., d] = h + s U f(D x)."""

    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return changed(base(x, *args, **kwargs), lambda h: h + self.bottleneck(x))


@register
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Targeted):
    """Small two-layer networks in every block: expressive, composable (`fusion`), not mergeable."""

    target_modules: str | list[str] = "sublayers"
    """`sublayers` (those of the variant), or the modules after or beside which a bottleneck stands, as names or a
    regular expression."""
    variant: Variant = "pfeiffer"
    """Where: after attention and feed-forward (`houlsby`), after the feed-forward (`pfeiffer`), beside it
    (`parallel`)."""
    reduction_factor: Count = 16
    """Width of the stream divided by the width of the waist; the waist has at least one unit."""
    non_linearity: NonLinearity = "relu"
    """The activation at the waist."""
    scale: Positive = 1.0
    """What the output of the bottleneck is multiplied by; He et al. use 4 for `parallel`."""
    dropout: Probability = 0.0
    """Fraction of the bottleneck's inputs dropped in training."""
    init_weights: Literal["zero", "normal"] = "zero"
    """`zero` starts exactly at the base (U at zero), `normal` near it (both weights of standard deviation 0.01)."""

    peft_type: ClassVar[str] = "BOTTLENECK"
    learning_rate: ClassVar[float] = 3e-4
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv:1902.00751"
    merges: ClassVar[str] = "not: its activation at the waist is more than a change of weights"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def targets(self, model: nn.Module) -> list[Site]:
        if self.target_modules == "sublayers":
            return replace(self, target_modules=exactly(self.places(model))).targets(model)
        return super().targets(model)

    @property
    def parallel(self) -> bool:
        """Whether a bottleneck is given what its host is given, instead of what it returns."""
        return self.variant == "parallel"

    def places(self, model: nn.Module) -> list[str]:
        """Where the variant sits in `model`."""
        if self.parallel:
            found, what = mlps(model), "has no module that is a feed-forward and nothing else"
        else:
            found, what = mlp_outputs(model), "has no feed-forward that peftctl knows by its name"
            found = found + attention_outputs(model) if found and self.variant == "houlsby" else found
        if not found:
            text = f"method.variant: `{self.variant}`: {type(model).__name__} {what}"
            raise AdapterError(text, "choose another variant, or name the modules in `target_modules`")
        return found

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        saved = {site.name for site in self.saved(model)}
        kind = Beside if self.parallel else After
        return [
            Trained(site.module) if site.name in saved else kind(self.waist(model, site.module, self.dropout))
            for site in sites
        ]

    def waist(self, model: nn.Module, host: nn.Module, dropout: float = 0.0) -> Waist:
        """The bottleneck of `host`, a module of `model`, at its start."""
        if hosts.is_linear(host):
            features = hosts.features(host)
            features = features if self.parallel else (features[1], features[1])
        else:
            features = (width(model), width(model))
        waist = max(1, features[1] // self.reduction_factor)
        made = Waist(features, waist, self.non_linearity, self.scale, dropout)
        made.start(self.init_weights)
        return made

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return (
            DEFAULTS
            | self.placed(adapters, After)
            | {
                "variant": self.variant,
                "reduction_factor": self.reduction_factor,
                "non_linearity": self.non_linearity,
                "scale": self.scale,
                "dropout": self.dropout,
                "init_weights": self.init_weights,
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Bottleneck:
        read = Reader(config, place)
        read.supported(DEFAULTS, set(DEFAULTS))
        names = sorted(read.sites(shapes, DOWN, "bottleneck"))
        found = cls(
            variant=read.choice("variant", get_args(Variant)),  # type: ignore[arg-type]
            reduction_factor=read.count("reduction_factor", DEFAULTS["reduction_factor"]),
            non_linearity=read.choice("non_linearity", get_args(NonLinearity)),  # type: ignore[arg-type]
            scale=read.number("scale", DEFAULTS["scale"]),
            dropout=read.number("dropout", DEFAULTS["dropout"], most=1),
            init_weights=read.choice("init_weights", ("zero", "normal")),  # type: ignore[arg-type]
            target_modules=names,
            modules_to_save=read.saved(shapes),
        )
        read.done()
        return found


DOWN = ".bottleneck.down.weight"

DEFAULTS: dict[str, Any] = {
    "variant": "pfeiffer",
    "reduction_factor": 16,
    "non_linearity": "relu",
    "scale": 1.0,
    "dropout": 0.0,
    "init_weights": "zero",
    "target_modules": None,
    "modules_to_save": None,
}
"""The keys of its adapter_config.json, which HF PEFT does not know, and what they are when left out."""
