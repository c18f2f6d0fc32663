"""AdapterFusion: attention over trained bottlenecks. Pfeiffer et al. 2020, arXiv:2005.00247.

s  = softmax_n (Q h) . (K z_n)        (eq. 3)
h' = h + sum_n s_n V z_n

h [d] what the host returns, z_n [d] the output of the frozen bottleneck n of N at this place, s [N] how much each one
counts for this token, Q, K and V [d, d] trained, one of each at every place: 3 d^2 parameters. V starts at the
identity and is held near it, so that with one bottleneck training starts from that bottleneck:

penalty = regularization * sum over places |V - I|^2
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from peftctl.config.block import Located, NonNegative
from peftctl.config.quote import quoted
from peftctl.engine.adapter import Adapter, Linear
from peftctl.engine.anatomy import Site
from peftctl.engine.attach import adapters_of
from peftctl.engine.disk import exact, planned
from peftctl.engine.method import Method, Targeted, register
from peftctl.engine.peft_config import CONFIG, Reader, read_config
from peftctl.engine.sample import Sample
from peftctl.engine.sublayers import changed, exactly
from peftctl.engine.tensor_file import PREFIX, WEIGHTS, read, shapes
from peftctl.engine.trained import Trained
from peftctl.errors import AdapterError, Problem
from peftctl.methods.bottleneck import After, Bottleneck, Waist


class Fuse(Adapter):
    """... -> h' [..., d]: what the host returns and a mixture of what the bottlenecks make of it, or of its input."""

    def __init__(self, made: list[Bottleneck], bottlenecks: list[Waist]) -> None:
        super().__init__()
        self.made = made  # what made the bottlenecks: to be written down, though their folders may be gone by then
        self.bottlenecks = nn.ModuleList(bottlenecks).requires_grad_(False)
        width = bottlenecks[0].up.out_features
        self.query, self.key, self.value = (Linear(width, width, bias=False) for _ in range(3))
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)  # as BERT's own, which the paper adapts
        nn.init.eye_(self.value.weight)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return changed(base(*args, **kwargs), lambda h: h + self.mixture(h, args[0] if self.made[0].parallel else h))

    def mixture(self, h: Tensor, x: Tensor) -> Tensor:
        """h [..., d], x [..., d], what the bottlenecks are given -> sum_n s_n V z_n [..., d]."""
        z = torch.stack([bottleneck(x) for bottleneck in self.bottlenecks], dim=-2)
        wanted = F.linear(self.query(h), self.key.weight.T.to(h.dtype))  # (Q h) . (K z) = (K^T Q h) . z
        s = (z @ wanted.unsqueeze(-1)).float().softmax(dim=-2).to(z.dtype)
        mixed: Tensor = self.value((s * z).sum(dim=-2))  # V (sum s z) = sum s V z
        return mixed

    def distance(self) -> Tensor:
        """|V - I|^2."""
        V = self.value.weight
        return (V - torch.eye(len(V), device=V.device)).square().sum()


@register
@dataclass(frozen=True, kw_only=True)
class Fusion(Targeted):
    """Combines bottlenecks trained on several tasks by attention over their outputs; they stay as they are."""

    adapters: Annotated[list[Located], MinLen(1)]
    """Folders of trained `bottleneck` adapters of one base, variant and place."""
    target_modules: str | list[str] = "bottlenecks"
    """`bottlenecks` (wherever they stand), or some of these places; elsewhere they are left out."""
    regularization: NonNegative = 0.01
    """How much is added to the loss for every unit of squared distance of the value matrices from the identity."""

    peft_type: ClassVar[str] = "FUSION"
    learning_rate: ClassVar[float] = 5e-5
    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv:2005.00247"
    merges: ClassVar[str] = "not: attention over networks is more than a change of weights"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    @property
    def folders(self) -> list[str]:
        return self.adapters

    def frozen(self) -> list[Bottleneck]:
        """The bottlenecks to combine, as their folders describe them."""
        return [described(Path(folder)) for folder in self.adapters]

    def planned(self, model: nn.Module, sample: Sample | None) -> Method:
        """Itself, once the folders are found to fit each other and `model`."""
        problems = [problem for folder in self.adapters for problem in self.mistakes(Path(folder))]
        if problems:
            raise AdapterError.of(problems)
        self.tensors(model)
        return self

    def mistakes(self, folder: Path) -> Iterator[Problem]:
        """Why the bottlenecks in `folder` cannot be combined with those of the first folder."""
        first, this = described(Path(self.adapters[0])), described(folder)
        if this.target_modules != first.target_modules or this.parallel != first.parallel:
            text = f"{folder}: its bottlenecks do not stand where those of `{self.adapters[0]}` do"
            yield Problem(text, "train them with the same `variant` and targets")
        for entry in this.modules_to_save:
            if entry not in self.modules_to_save:
                text = (
                    f"{folder}: trained {quoted(entry)} whole beside its bottlenecks, which a fusion does not take over"
                )
                yield Problem(text, "name it in `method.modules_to_save` to train it anew")

    def tensors(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """What every folder holds, by its names on disk; raises AdapterError where that does not fit `model`."""
        found = []
        for folder, method in zip(map(Path, self.adapters), self.frozen(), strict=True):
            sizes, _ = planned(model, exact(method, model), folder)
            found.append(read(model, folder / WEIGHTS, sizes))
        return found

    @torch.no_grad()
    def start(self, model: nn.Module, name: str, sample: Sample | None) -> None:
        for index, tensors in enumerate(self.tensors(model)):
            for site, adapter in adapters_of(model, name).items():
                for leaf, tensor in adapter.state_dict(keep_vars=True).items():
                    if leaf.startswith(f"bottlenecks.{index}."):
                        tensor.copy_(tensors[f"{PREFIX}{site}.{as_alone(leaf, index)}"])

    def targets(self, model: nn.Module) -> list[Site]:
        places = self.frozen()[0].target_modules
        if self.target_modules == "bottlenecks":
            return replace(self, target_modules=exactly(places)).targets(model)
        found = super().targets(model)
        if strays := [site.name for site in found if site.name not in places]:
            text = "method.target_modules: no bottleneck stands at `{}`"
            raise AdapterError.of([Problem(text.format(name)) for name in strays])
        return found

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        saved = {site.name for site in self.saved(model)}
        frozen = self.frozen()
        return [
            Trained(module) if name in saved else Fuse(frozen, [method.waist(model, module) for method in frozen])
            for name, module in sites
        ]

    def penalty(self, model: nn.Module) -> Tensor | float:
        learning = [m for m in model.modules() if isinstance(m, Fuse) and any(p.requires_grad for p in m.parameters())]
        if not learning:
            return 0.0
        device = next(learning[0].parameters()).device
        return self.regularization * torch.stack([fuse.distance().to(device) for fuse in learning]).sum()

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        fused = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, Fuse)}
        made = next(iter(fused.values())).made
        return self.placed(adapters, Fuse) | {
            "adapters": [
                replace(method, modules_to_save=[]).peft_config(
                    {name: After(cast(Waist, fuse.bottlenecks[i])) for name, fuse in fused.items()}
                )
                for i, method in enumerate(made)
            ],
            "regularization": self.regularization,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Fusion:
        reader = Reader(config, place)
        reader.supported({}, {"adapters", "regularization", "target_modules", "modules_to_save"})
        parts = config.get("adapters")
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            reader.wrong("adapters", "expected a list of what each of the bottlenecks is")
            parts = []
        regularization, saved = reader.number("regularization", 0.01), reader.saved(shapes)
        reader.done()
        alone = [
            Bottleneck.from_peft(
                part, {as_alone(key, i): shape for key, shape in shapes.items()}, f"{place}: adapters[{i}]"
            )
            for i, part in enumerate(parts)
        ]
        return Fused(
            adapters=[],
            bottlenecks=alone,
            target_modules=alone[0].target_modules,
            regularization=regularization,
            modules_to_save=saved,
        )


@dataclass(frozen=True, kw_only=True)
class Fused(Fusion):
    """A fusion read from a folder of its own, which holds its bottlenecks too."""

    bottlenecks: list[Bottleneck]
    """What each of them is."""

    def frozen(self) -> list[Bottleneck]:
        return self.bottlenecks

    def planned(self, model: nn.Module, sample: Sample | None) -> Method:
        return self

    def start(self, model: nn.Module, name: str, sample: Sample | None) -> None:
        """Nothing: they come with the rest of the folder."""


def described(folder: Path) -> Bottleneck:
    """What the bottlenecks in `folder` are; raises AdapterError when it holds something else."""
    config, place = read_config(folder), str(folder / CONFIG)
    if not Bottleneck.reads(config):
        kind = quoted(str(config.get("peft_type")))
        raise AdapterError(f"{place}: a fusion combines adapters of the method `bottleneck`; this is a {kind}")
    return Bottleneck.from_peft(config, shapes(folder), place)


def as_alone(name: str, index: int) -> str:
    """The name that a tensor of the bottleneck number `index` has in a folder of its own; other names stay."""
    return re.sub(rf"(^|\.)bottlenecks\.{index}\.", r"\1bottleneck.", name)
