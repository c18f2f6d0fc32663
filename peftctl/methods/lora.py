"""LoRA: low-rank updates. Hu et al. 2021, arXiv:2106.09685.

y = W x + s B A x,   s = alpha / r                (eq. 3)
                     s = alpha / sqrt(r)          with `use_rslora` (Kalajdzievski 2023, arXiv:2312.03732)

W [out, in] frozen, A [r, in], B [out, r]. B starts at zero, so training starts from the base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import nn

from peftctl.config.block import Count, Positive, Probability
from peftctl.config.quote import quoted
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, modules
from peftctl.engine.low_rank import LoRAEmbedding, LoRALinear, LowRank
from peftctl.engine.method import Method, Targeted, register
from peftctl.engine.patterns import by_pattern
from peftctl.engine.peft_config import LORA, LORA_CHANGES_BASE, Reader
from peftctl.engine.rank_allocation import WIDEST, gradient_ranks
from peftctl.engine.sample import Sample
from peftctl.engine.trained import Bias
from peftctl.errors import AdapterError

__all__ = ["LoRA", "LoRAEmbedding", "LoRALinear", "LowRank"]


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Targeted):
    """Low-rank updates of linears and embeddings: the default choice for most fine-tuning."""

    r: Count = 16
    """Rank of the update."""
    alpha: Positive = 32
    """Numerator of the scale: the update is multiplied by alpha / r."""
    dropout: Probability = 0.0
    """Fraction of the adapter's inputs dropped in training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), so that large ranks learn at the pace of small ones."""
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    """Rank by module: a regular expression over the last parts of a name -> its rank."""
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    """Alpha by module, as `rank_pattern`."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained beside the update: of no module, of all, of the adapted ones."""
    lora_plus_ratio: Positive | None = None
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at this many times the learning rate; 16 is usual."""
    rank_allocation: Literal["uniform", "gradient"] = "uniform"
    """`gradient`: the parameters of rank `r` everywhere go to where the loss is most sensitive, by the gradients of a
    few batches before training; every module gets at least rank 1 and keeps the scale it would have had."""

    peft_type: ClassVar[str] = "LORA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"

    def planned(self, model: nn.Module, sample: Sample | None) -> Method:
        if self.rank_allocation == "uniform":
            return self
        if sample is None:
            hint = "`attach(model, method, sample=...)`, or `rank_allocation: uniform`"
            raise AdapterError("method.rank_allocation: gradients need rows to look at", hint)
        even = replace(self, rank_allocation="uniform")
        probe = replace(even, r=WIDEST * self.r, dropout=0.0, bias="none")
        ranks = gradient_ranks(model, probe, sample, self.r)
        power = 0.5 if self.use_rslora else 1  # alpha goes with the rank, so that the scale stays
        alphas = {name: self.alpha * (rank / self.r) ** power for name, rank in ranks.items()}
        return replace(
            even,
            rank_pattern={"^" + re.escape(name): rank for name, rank in ranks.items() if rank != self.r},
            alpha_pattern={"^" + re.escape(name): a for name, a in alphas.items() if a != self.alpha},
        )

    def __post_init__(self) -> None:
        if self.rank_allocation == "gradient" and (self.rank_pattern or self.alpha_pattern):
            raise ValueError("rank_allocation chooses the ranks; hint: leave `rank_pattern` and `alpha_pattern` out")

    def rank(self, name: str) -> int:
        """The rank at the module `name`."""
        return int(by_pattern(self.rank_pattern, name, self.r))

    def scale(self, name: str) -> float:
        """What the update at the module `name` is multiplied by."""
        alpha, rank = by_pattern(self.alpha_pattern, name, self.alpha), self.rank(name)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        return sites + self.other_biases(model, sites) if self.bias == "all" else sites

    def other_biases(self, model: nn.Module, taken: list[Site]) -> list[Site]:
        """Modules outside all of `taken` that end in adding a bias."""
        inside = tuple(f"{site.name}." for site in taken)
        ends = (nn.LayerNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d)
        adding = (s for s in modules(model) if hosts.is_linear(s.module) or isinstance(s.module, ends))
        return [s for s in adding if not f"{s.name}.".startswith(inside) and hosts.bias(s.module) is not None]

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        adapted = super().sites(model)
        return super().build(model, adapted) + [Bias(site.module) for site in sites[len(adapted) :]]

    def adapter(self, site: Site) -> Adapter:
        rank, scale = self.rank(site.name), self.scale(site.name)
        if isinstance(site.module, nn.Embedding):
            return LoRAEmbedding(site.module, rank, scale)
        return LoRALinear(site.module, rank, scale, self.dropout, self.bias != "none")

    def groups(self, named: Mapping[str, nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
        if self.lora_plus_ratio is None:
            return super().groups(named, learning_rate)
        fast = [p for n, p in named.items() if n.endswith((".lora_B.weight", ".lora_embedding_B"))]
        slow = [p for p in named.values() if not any(p is q for q in fast)]
        groups = [{"params": slow, "lr": learning_rate}, {"params": fast, "lr": learning_rate * self.lora_plus_ratio}]
        return [group for group in groups if group["params"]]

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        names = sorted(name for name, adapter in adapters.items() if isinstance(adapter, LowRank))
        alphas = {name: by_pattern(self.alpha_pattern, name, self.alpha) for name in names}
        return LORA | {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "bias": self.bias,
            "fan_in_fan_out": any(hosts.kind(adapters[name].host) == "Conv1D" for name in names),
            "target_modules": names,
            "modules_to_save": sorted(self.modules_to_save) or None,
            "rank_pattern": {name: self.rank(name) for name in names if self.rank(name) != self.r},
            "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != self.alpha},
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return super().reads(config) and not config.get("use_dora") and not config.get("use_qalora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> LoRA:
        read = Reader(config, place)
        read.supported(LORA, UNDERSTOOD)
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(LORA_CHANGES_BASE):
            hint = "save it from PEFT with `path_initial_model_for_weight_conversion`"
            read.wrong("init_lora_weights", f"{quoted(init)} makes the adapter one for a changed base", hint)
        ranks = {site(key): shape[0] if shape else 0 for key, shape in shapes.items() if key.endswith(A_LEAVES)}
        r, alpha = read.count("r", LORA["r"]), read.number("lora_alpha", LORA["lora_alpha"])
        dropout, use_rslora = read.number("lora_dropout", 0.0, most=1), read.flag("use_rslora")
        bias, saved = read.choice("bias", ("none", "all", "lora_only")), read.saved(shapes)
        pattern, alpha_pattern = read.patterns("rank_pattern", ranks), read.patterns("alpha_pattern", ranks)
        if not ranks:
            read.wrong("peft_type", "the tensor file beside it holds no LoRA")
        read.done()
        for name, rank in ranks.items():
            said = by_pattern(pattern, name, r)
            if rank != said:
                read.wrong("r", f"{quoted(name)} has rank {rank}, the config says {said}")
        read.done()
        alphas = {name: by_pattern(alpha_pattern, name, alpha) for name in ranks}
        return cls(
            r=r,
            alpha=alpha,
            dropout=dropout,
            use_rslora=use_rslora,
            bias=bias,  # type: ignore[arg-type]
            target_modules=sorted(ranks),
            modules_to_save=saved,
            rank_pattern={"^" + re.escape(name): rank for name, rank in ranks.items() if rank != r},
            alpha_pattern={"^" + re.escape(name): value for name, value in alphas.items() if value != alpha},
        )


A_LEAVES = (".lora_A.weight", ".lora_embedding_A")


def site(key: str) -> str:
    """The module that the tensor `key` of an A belongs to."""
    return next(key.removesuffix(leaf) for leaf in A_LEAVES if key.endswith(leaf))


UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights"),
    # where the adapter sits is read from its tensors; these say the same in other words
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    # of interest while training only, or meaningless here
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("megatron_config", "megatron_core"),
}
