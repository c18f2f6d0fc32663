"""QA-LoRA: LoRA that sees its input in groups, as group-wise quantisation sees the weight. Xu et al. 2023,
arXiv:2309.14717.

y = W x + s B A pool(x),   pool(x)_l = in/g mean of x_i over group l,   s = alpha / r       (section 3.3, algorithm 1)

W [out, in] frozen, its inputs in groups of g, A [r, in/g], B [out, r]. B starts at zero, so training starts from the
base model. Each row of the update has one value for all inputs of a group. The factor in/g is HF PEFT's, whose folders
these are; the paper's is g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peftctl.config.block import Count, Positive, Probability
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter, Linear
from peftctl.engine.anatomy import Site
from peftctl.engine.biased import Biased
from peftctl.engine.method import register
from peftctl.engine.peft_config import LORA, Reader
from peftctl.engine.update import Update
from peftctl.errors import AdapterError, Problem


class QALoRALinear(Update):
    """x [..., in] -> y [..., out]; lora_A [r, in/g], lora_B [out, r]."""

    def __init__(self, host: nn.Module, rank: int, group: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__(host, dropout, bias)
        in_features, out_features = hosts.features(host)
        self.group, self.groups, self.scale = group, in_features // group, scale
        self.lora_A = Linear(self.groups, rank, bias=False)
        self.lora_B = Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def update(self, x: Tensor) -> Tensor:
        means = x.reshape(*x.shape[:-1], self.groups, self.group).mean(-1)
        update: Tensor = self.lora_B((self.scale * self.groups) * self.lora_A(means))
        return update

    def matrix(self) -> Tensor:
        A = self.lora_A.weight.repeat_interleave(self.group, 1)
        return (self.scale * self.groups / self.group) * (self.lora_B.weight @ A)


@register
@dataclass(frozen=True, kw_only=True)
class QALoRA(Biased):
    """LoRA on groups of inputs: for bases that are served in group-wise 4-bit weights, into which it can be written."""

    r: Count = 16
    """Rank of the update."""
    alpha: Positive = 32
    """Numerator of the scale: the update is multiplied by alpha / r."""
    group_size: Count = 16
    """Inputs in a group, which the update cannot tell apart; that of the quantised weights, or a multiple of it."""
    dropout: Probability = 0.0
    """Fraction of the adapter's inputs dropped in training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), so that large ranks learn at the pace of small ones."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained beside the update: of no module, of all, of the adapted ones."""

    peft_type: ClassVar[str] = "LORA"
    learning_rate: ClassVar[float] = 2e-5  # the paper's; pooled inputs are larger than LoRA's
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    paper: ClassVar[str] = "Xu et al. 2023, arXiv:2309.14717"
    merges: ClassVar[str] = (
        "into any 16- or 32-bit weight; not, as in the paper, into the zero points of a quantised one: NF4, FP4 and "
        "bitsandbytes' int8 have none, and GPTQ and AWQ weights are no hosts here"
    )

    def targets(self, model: nn.Module) -> list[Site]:
        sites = super().targets(model)
        problems = [
            Problem(
                f"method.group_size: the {inputs} inputs of `{site.name}` are no multiple of {self.group_size}",
                "take a size that divides them, or leave the module out with `exclude_modules`",
            )
            for site in sites
            for inputs, _ in [hosts.features(site.module)]
            if inputs % self.group_size
        ]
        if problems:
            raise AdapterError.of(problems)
        return sites

    def adapter(self, site: Site) -> Adapter:
        scale = self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        return QALoRALinear(site.module, self.r, self.group_size, scale, self.dropout, self.bias != "none")

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        placed = self.placed(adapters, QALoRALinear)
        return (
            LORA
            | placed
            | {
                "use_qalora": True,
                "qalora_group_size": self.group_size,
                "r": self.r,
                "lora_alpha": self.alpha,
                "lora_dropout": self.dropout,
                "use_rslora": self.use_rslora,
                "bias": self.bias,
                "fan_in_fan_out": hosts.any_conv1d(adapters[name].host for name in placed["target_modules"]),
            }
        )

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return super().reads(config) and config.get("use_qalora") is True and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> QALoRA:
        read = Reader(config, place)
        read.supported(LORA, UNDERSTOOD)
        sites = read.sites(shapes, A, "QA-LoRA")
        r = read.count("r", LORA["r"])
        method = cls(
            r=r,
            alpha=read.number("lora_alpha", LORA["lora_alpha"]),
            group_size=read.count("qalora_group_size", LORA["qalora_group_size"]),
            dropout=read.number("lora_dropout", 0.0, most=1),
            use_rslora=read.flag("use_rslora"),
            bias=read.choice("bias", ("none", "all", "lora_only")),  # type: ignore[arg-type]
            target_modules=sorted(sites),
            modules_to_save=read.saved(shapes),
        )
        read.same_ranks(sites, lambda name: r)
        read.done()
        return method


A = ".lora_A.weight"

UNDERSTOOD = {
    *("use_qalora", "qalora_group_size", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"),
    # where the adapter sits is read from its tensors; these say the same in other words
    *("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "megatron_core"),
}
