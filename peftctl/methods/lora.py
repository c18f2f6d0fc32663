"""LoRA: low-rank updates. Hu et al. 2021, arXiv:2106.09685.

y = W x + s B A x,   s = alpha / r                (eq. 3)
                     s = alpha / sqrt(r)          with `use_rslora` (Kalajdzievski 2023, arXiv:2312.03732)

W [out, in] frozen, A [r, in], B [out, r]. B starts at zero, so training starts from the base model; `init_weights`
names other starts (engine/starts.py). Of a convolution W is [out, in, *kernel] and A [r, in, *kernel]; of an embedding
the rows are its inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import nn

from peftctl.config.block import Count, Natural, Positive, Probability
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site
from peftctl.engine.biased import Biased
from peftctl.engine.lora_folder import LOFTQ, read_lora
from peftctl.engine.low_rank import LoRAConv, LoRAEmbedding, LoRAFromStart, LoRALinear, LowRank
from peftctl.engine.method import Method, register
from peftctl.engine.patterns import by_pattern
from peftctl.engine.peft_config import LORA
from peftctl.engine.rank_allocation import WIDEST, gradient_ranks
from peftctl.engine.sample import Sample
from peftctl.engine.starts import FROM_START, Start, start
from peftctl.engine.token_rows import build_rows, rows_of
from peftctl.errors import AdapterError, Problem

__all__ = ["LoRA", "LoRAEmbedding", "LoRALinear", "LowRank"]


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Biased):
    """Low-rank updates of linears, embeddings and convolutions: the default choice for most fine-tuning."""

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
    init_weights: Start = "default"
    """How the update starts. `default`, `gaussian`: A random, B zero; `orthogonal`: both random, BA zero; `pissa`: the
    main singular vectors of the weight; `olora`: its first QR terms; `eva`: A the main directions of the inputs in a
    few batches; `loftq`: the main singular vectors of what quantisation took from the weight. Embeddings and
    convolutions know the first two only."""
    trainable_token_indices: list[Natural] | dict[str, list[Natural]] | None = None
    """Tokens whose embeddings are trained beside: ids of the input embedding, or name of a module -> ids. An output
    head that shares the weight follows."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained beside the update: of no module, of all, of the adapted ones."""
    lora_plus_ratio: Positive | None = None
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at this many times the learning rate; 16 is usual."""
    rank_allocation: Literal["uniform", "gradient"] = "uniform"
    """`gradient`: the parameters of rank `r` everywhere go to where the loss is most sensitive, by the gradients of a
    few batches before training; every module gets at least rank 1 and keeps the scale it would have had."""

    peft_type: ClassVar[str] = "LORA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"
    merges: ClassVar[str] = "into any 16- or 32-bit weight; after `init_weights: loftq` into the dequantised one alone"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, nn.Conv1d, nn.Conv2d)

    def planned(self, model: nn.Module, sample: Sample | None) -> Method:
        if self.rank_allocation == "uniform":
            return self
        if sample is None:
            hint = "`attach(model, method, sample=...)`, or `rank_allocation: uniform`"
            raise AdapterError("method.rank_allocation: gradients need rows to look at", hint)
        even = replace(self, rank_allocation="uniform")
        plain = {"dropout": 0.0, "bias": "none", "init_weights": "default", "trainable_token_indices": None}
        probe = replace(even, r=WIDEST * self.r, **plain)  # type: ignore[arg-type]
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
        if self.init_from and self.init_weights in FROM_START:
            raise ValueError(f"init_weights: `{self.init_weights}` is a start, as `init_from` is; hint: leave one out")

    @property
    def needs_quantised(self) -> bool:
        return self.init_weights == "loftq"

    def start(self, model: nn.Module, name: str, sample: Sample | None) -> None:
        if self.init_weights != "default" and self.init_from is None:
            start(model, name, self.init_weights, sample)

    def rank(self, name: str) -> int:
        """The rank at the module `name`."""
        return int(by_pattern(self.rank_pattern, name, self.r))

    def scale(self, name: str) -> float:
        """What the update at the module `name` is multiplied by."""
        alpha, rank = by_pattern(self.alpha_pattern, name, self.alpha), self.rank(name)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        rows = [row.site for row in rows_of(model, self.trainable_token_indices)]
        if twice := {site.name for site in sites} & {site.name for site in rows}:
            text = (
                "method.trainable_token_indices: `{}` is adapted as a whole too, or shares the weight of such a module"
            )
            raise AdapterError.of([Problem(text.format(name), "leave one out") for name in sorted(twice)])
        return sites + rows

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        rows = rows_of(model, self.trainable_token_indices)
        return super().build(model, sites[: len(sites) - len(rows)]) + build_rows(rows)

    def adapter(self, site: Site) -> Adapter:
        rank, scale = self.rank(site.name), self.scale(site.name)
        if isinstance(site.module, nn.Embedding):
            return LoRAEmbedding(site.module, rank, scale)
        if isinstance(site.module, nn.Conv1d | nn.Conv2d):
            return LoRAConv(site.module, rank, scale, self.dropout, self.bias != "none")
        form = LoRAFromStart if self.init_weights in FROM_START else LoRALinear
        return form(site.module, rank, scale, self.dropout, self.bias != "none")

    def groups(self, named: Mapping[str, nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
        if self.lora_plus_ratio is None:
            return super().groups(named, learning_rate)
        fast = [p for n, p in named.items() if n.endswith((".lora_B.weight", ".lora_embedding_B"))]
        slow = [p for p in named.values() if not any(p is q for q in fast)]
        groups = [{"params": slow, "lr": learning_rate}, {"params": fast, "lr": learning_rate * self.lora_plus_ratio}]
        return [group for group in groups if group["params"]]

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        placed = self.placed(adapters, LowRank)
        names = placed["target_modules"]
        alphas = {name: by_pattern(self.alpha_pattern, name, self.alpha) for name in names}
        twice = 2 if self.init_weights in FROM_START else 1  # their start is written beside them
        more = math.sqrt(twice) if self.use_rslora and twice > 1 else twice
        return (
            LORA
            | placed
            | {
                "r": twice * self.r,
                "lora_alpha": more * self.alpha,
                "lora_dropout": self.dropout,
                "use_rslora": self.use_rslora,
                "bias": self.bias,
                "fan_in_fan_out": hosts.any_conv1d(adapters[name].host for name in names),
                "loftq_config": LOFTQ if self.needs_quantised else {},
                "trainable_token_indices": self.trainable_token_indices,
                "rank_pattern": {name: twice * self.rank(name) for name in names if self.rank(name) != self.r},
                "alpha_pattern": {name: more * alpha for name, alpha in alphas.items() if alpha != self.alpha},
            }
        )

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return super().reads(config) and not config.get("use_dora") and not config.get("use_qalora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> LoRA:
        return cls(**read_lora(config, shapes, place))
