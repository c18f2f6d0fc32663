"""AdaLoRA: low-rank updates whose ranks go to where they matter. Zhang et al. 2023, arXiv:2303.10512.

y = W x + s P L Q x,   s = alpha / init_r                                                         (eq. 3)

W [out, in] frozen, P [out, r], L [r, r] diagonal, Q [r, in]; on disk lora_B, lora_E [r, 1], lora_A. L starts at zero:
training starts from the base model. Triplet i is column i of P, L_ii, row i of Q. Its importance in training is

S_i = s(L_ii) + mean_j s(P_ji) + mean_j s(Q_ij)                                                (section 3.2)
s = I' U',   I' <- beta1 I' + (1 - beta1) I,   U' <- beta2 U' + (1 - beta2) |I - I'|,   I = |w dC/dw|

and at step t the b(t) most important triplets of all modules keep their L_ii, the others' is set to zero. With b_0 the
triplets at the start, b_T those to be kept and T the steps of the run:                      (section 3.3)

b(t) = b_0                                                                     up to t = tinit
b(t) = b_T + (b_0 - b_T) (1 - (t - tinit) / (T - tinit - tfinal))^3            up to t = T - tfinal
b(t) = b_T                                                                     then, and the choice is final

Where the paper and its authors' code differ, this is the code, as HF PEFT has it: the cube above, a last choice by what
was measured up to the step before it, and the penalty of the loss: orth_reg_weight times the mean over all modules of
|P^T P - I| and |Q Q^T - I|, Frobenius norms that are not squared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from peftctl.config.block import Count, Natural, NonNegative, Positive, Probability
from peftctl.config.quote import quoted
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site
from peftctl.engine.attach import adapters_of
from peftctl.engine.biased import Biased
from peftctl.engine.method import register
from peftctl.engine.peft_config import LORA, Reader
from peftctl.engine.triplets import Schedule, SVDLinear, choose
from peftctl.errors import AdapterError, Problem

Share = Annotated[float, Gt(0), Lt(1)]
"""A number between zero and one, and neither of them."""


@register
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Biased):
    """Updates that start with a generous rank everywhere and end with a smaller one, spent where it matters."""

    target_r: Count = 8
    """Rank at the end, on average over the modules; a module may end with none at all, or with `init_r`."""
    init_r: Count = 12
    """Rank of every module at the start."""
    tinit: Natural | None = None
    """Steps before the first triplet is dropped; a tenth of the run when left out."""
    tfinal: Natural | None = None
    """Steps after the last is dropped, with the final ranks; half of the run when left out. A best adapter that
    `trainer.keep_best` finds before them still has more ranks."""
    deltaT: Count | None = None
    """Steps from one choice of triplets to the next; a five-hundredth of the run when left out."""
    total_step: Count | None = None
    """Steps that the schedule is made for; those of the run when left out, and never more."""
    beta1: Share = 0.85
    """Weight of the past in the mean of the sensitivity."""
    beta2: Share = 0.85
    """Weight of the past in the mean of its uncertainty."""
    orth_reg_weight: NonNegative = 0.5
    """What the distance of P and Q from orthogonal matrices is multiplied by, in the loss."""
    alpha: Positive = 32
    """Numerator of the scale: the update is multiplied by alpha / init_r, also when triplets have been dropped."""
    dropout: Probability = 0.0
    """Fraction of the adapter's inputs dropped in training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained beside the update: of no module, of all, of the adapted ones."""
    rank_pattern: dict[str, list[bool]] = field(default_factory=dict)
    """Triplets that are left: name of a module with `.lora_E` -> `init_r` times true or false. Stands in the folders
    of trained adapters; a run finds its own."""

    peft_type: ClassVar[str] = "ADALORA"
    learning_rate: ClassVar[float] = 1e-3  # the paper's are 5e-4 to 8e-3
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv:2303.10512"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __post_init__(self) -> None:
        if self.target_r > self.init_r:
            raise ValueError(f"target_r: {self.target_r} is more than `init_r`, {self.init_r}; hint: ranks only shrink")
        if any(len(left) != self.init_r for left in self.rank_pattern.values()):
            raise ValueError("rank_pattern: expected `init_r` times true or false for each module")
        if self.total_step and not self.schedule(self.total_step).fits:
            raise ValueError("total_step: `tinit` and `tfinal` leave no step to choose ranks at; hint: lower them")

    def adapter(self, site: Site) -> Adapter:
        left = self.rank_pattern.get(site.name + E)
        chosen = range(self.init_r) if left is None else [number for number, kept in enumerate(left) if kept]
        scale = self.alpha / (self.init_r + 1e-5)  # HF PEFT's divisor
        steps = self.total_step or 0
        return SVDLinear(site.module, self.init_r, chosen, scale, self.dropout, self.bias != "none", steps)

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        if unknown := self.rank_pattern.keys() - {site.name + E for site in sites}:
            text = "method.rank_pattern: `{}` is no module that is adapted, followed by `.lora_E`"
            raise AdapterError.of([Problem(text.format(key)) for key in sorted(unknown)])
        return super().build(model, sites)

    def schedule(self, steps: int) -> Schedule:
        """The schedule in a run of `steps` steps."""
        total = min(self.total_step or steps, steps)
        tinit = total // 10 if self.tinit is None else self.tinit
        tfinal = total // 2 if self.tfinal is None else self.tfinal
        return Schedule(tinit, tfinal, self.deltaT or max(1, total // 500), total)

    def schedule_on_disk(self, adapters: Sequence[SVDLinear]) -> Schedule:
        """The schedule that `adapters` were trained with; HF PEFT wants one that fits of those that were not, too."""
        recorded = self.schedule(max(int(adapter.total_step) for adapter in adapters))
        tinit, tfinal = self.tinit or 0, self.tfinal or 0
        return recorded if recorded.fits else Schedule(tinit, tfinal, self.deltaT or 1, tinit + tfinal + 1)

    def penalty(self, model: nn.Module) -> Tensor | float:
        adapters = in_training(model)
        if not adapters or not self.orth_reg_weight:
            return 0.0
        device = adapters[0].lora_E.device
        distances = [adapter.off_orthogonal().to(device) for adapter in adapters]
        return self.orth_reg_weight * torch.stack(distances).mean() / 2  # each of them is of two matrices

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        adapters, now = in_training(model), step + 1
        have, target = sum(len(adapter.chosen) for adapter in adapters), self.target_r * len(adapters)
        if have <= target:
            return
        schedule = self.schedule(steps)
        if not schedule.fits:
            tinit, tfinal, _, total = schedule
            text = f"method.tinit: {tinit} steps before and {tfinal} after the choice of ranks leave none of {total}"
            raise AdapterError(text, "lower `tinit` or `tfinal`, leave them out, or train for longer")
        for adapter in adapters:
            adapter.total_step.fill_(schedule.total)
            if now < schedule.last:
                adapter.watch(self.beta1, self.beta2)
        if schedule.due(now):
            choose(adapters, schedule.budget(now, have, target))
        if schedule.due(now) or now > schedule.last:
            for adapter in adapters:
                adapter.drop()

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        found = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, SVDLinear)}
        ranks = {name + E: adapter.ranks() for name, adapter in sorted(found.items())}
        schedule = self.schedule_on_disk(list(found.values()))
        return (
            ADALORA
            | self.placed(adapters, SVDLinear)
            | {
                "target_r": self.target_r,
                "init_r": self.init_r,
                "tinit": schedule.tinit,
                "tfinal": schedule.tfinal,
                "deltaT": schedule.deltaT,
                "total_step": schedule.total,
                "beta1": self.beta1,
                "beta2": self.beta2,
                "orth_reg_weight": self.orth_reg_weight,
                "rank_pattern": None if all(all(left) for left in ranks.values()) else ranks,
                "lora_alpha": self.alpha,
                "lora_dropout": self.dropout,
                "bias": self.bias,
                "fan_in_fan_out": hosts.any_conv1d(adapter.host for adapter in found.values()),
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> AdaLoRA:
        read = Reader(config, place)
        read.supported(ADALORA, UNDERSTOOD)
        sites = read.sites(shapes, E, "AdaLoRA")
        ranks = {name: shape[0] if shape else 0 for name, shape in sites.items()}
        fields: dict[str, Any] = {
            **{key: read.count(key, ADALORA[key]) for key in ("target_r", "init_r", "deltaT")},
            **{key: read.count(key, ADALORA[key], least=0) for key in ("tinit", "tfinal")},
            **{key: read.number(key, ADALORA[key]) for key in ("beta1", "beta2", "orth_reg_weight")},
            "total_step": read.count("total_step", 0, most=1e12),
            "alpha": read.number("lora_alpha", ADALORA["lora_alpha"]),
            "dropout": read.number("lora_dropout", ADALORA["lora_dropout"], most=1),
            "bias": read.choice("bias", ("none", "all", "lora_only")),
            "modules_to_save": read.saved(shapes),
            "target_modules": sorted(ranks),
        }
        fields["rank_pattern"] = read_pattern(read, ranks, fields["init_r"])
        read.done()
        if not (0 < fields["beta1"] < 1 and 0 < fields["beta2"] < 1):
            read.wrong("beta1", "`beta1` and `beta2` have to lie between 0 and 1")
        if not fields["alpha"]:
            read.wrong("lora_alpha", "expected a number above 0; got `0`")
        if fields["tinit"] + fields["tfinal"] >= fields["total_step"]:
            read.wrong("total_step", "`tinit` and `tfinal` leave no step to choose ranks at")
        if fields["target_r"] > fields["init_r"]:
            read.wrong("target_r", f"{fields['target_r']} is more than `init_r`, {fields['init_r']}")
        read.done()
        return cls(**fields)


def in_training(model: nn.Module) -> list[SVDLinear]:
    """The adapters of `model` that are being trained."""
    return [a for a in adapters_of(model).values() if isinstance(a, SVDLinear) and a.lora_E.requires_grad]


def read_pattern(read: Reader, ranks: Mapping[str, int], init_r: int) -> dict[str, list[bool]]:
    """Which triplets the modules of a folder, by name with the rank that their tensors have, have left."""
    pattern = read.config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        read.wrong("rank_pattern", f"expected a mapping; got {quoted(str(pattern))}")
        return {}
    for key, left in pattern.items():
        if not key.endswith(E) or key.removesuffix(E) not in ranks:
            read.wrong("rank_pattern", f"{quoted(key)} is no tensor of the file beside it")
        elif not isinstance(left, list) or len(left) != init_r or not all(isinstance(kept, bool) for kept in left):
            read.wrong("rank_pattern", f"{quoted(key)}: expected `init_r`, {init_r}, times true or false")
        elif sum(left) != ranks[key.removesuffix(E)]:
            rank = ranks[key.removesuffix(E)]
            read.wrong("rank_pattern", f"{quoted(key)} has {rank} rows, {sum(left)} are left by this pattern")
    for name, rank in ranks.items():
        if name + E not in pattern and rank != init_r:
            read.wrong("init_r", f"{quoted(name)} has rank {rank}, the config says {init_r}")
    return pattern


E = ".lora_E"

ADALORA: dict[str, Any] = LORA | {
    "beta1": 0.85,
    "beta2": 0.85,
    "deltaT": 1,
    "init_r": 12,
    "orth_reg_weight": 0.5,
    "rank_pattern": None,
    "target_r": 8,
    "tfinal": 0,
    "tinit": 0,
    "total_step": None,
}
"""AdaLoraConfig's own keys with its defaults."""

UNDERSTOOD = {
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2", "orth_reg_weight"),
    *("lora_alpha", "lora_dropout", "bias", "rank_pattern", "target_modules", "modules_to_save"),
    # where the adapter sits is read from its tensors; these say the same in other words
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    # of LoRA alone, or of interest before training only
    *("r", "alpha_pattern", "init_lora_weights", "qalora_group_size", "megatron_config", "megatron_core"),
}
