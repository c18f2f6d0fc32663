"""LoReFT: low-rank edits of hidden states at a few positions of the prompt. Wu et al. 2024, arXiv:2404.03592.

h' = h + R^T (W h + b - R h)          (eq. 2)

h [d] what a block returns at one position, R [r, d] with orthonormal rows, W [r, d], b [r]. The base's weights take no
part, and other positions see the edit through attention. W starts as R and b at zero, so training starts from the base.

Positions are the first n and last m tokens of the prompt, padding aside; a prompt shorter than n + m has each of its
tokens edited once, by the nearer end. The prompt is
  in training and evaluation    what stands before the first trained token of a row;
  in generation                 what the first forward is given; later ones, with the cache, edit nothing;
  in any other forward          all of the row, or what a `prompt_mask` [rows, length] given to the model says;
  of an encoder and decoder     all that the encoder is given; its blocks alone are edited.
Cached generation is therefore what a forward over prompt and answer computes. Without the cache (`use_cache=False`)
each forward of generation would take all it is given for the prompt; with `last` positions that is refused.
A row with several answers is edited before the first of them only.

R is the Q of a QR decomposition of a free matrix A^T [d, r], with the signs that make it unique.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.block import Count, Natural, Probability
from peftctl.engine.adapter import Adapter, Linear
from peftctl.engine.anatomy import Site, find, has_decoder, in_layers, modules
from peftctl.engine.method import Targeted, register
from peftctl.engine.peft_config import Reader
from peftctl.engine.sublayers import blocks, changed, exactly, width
from peftctl.engine.trained import Trained
from peftctl.errors import AdapterError, Problem


class Positions(Adapter):
    """Around the model, or its encoder: notes which positions of the batch at hand the blocks are to edit."""

    takes = ("prompt_mask",)

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.inside = False
        self.decoding = False
        self.prompt: Tensor | None = None

    def forward(self, base: Callable[..., Any], *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any) -> Any:
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", None) != 2:
            got = f"one of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            hint = "say which tokens are no padding, and generate with the default cache"  # a static one makes others
            raise AdapterError(f"reft: expected an attention mask [rows, length]; got {got}", hint)
        if prompt_mask is None and self.last and given.get("use_cache") is False and generates(self.host):
            text = "reft: without the cache the end of the prompt is not known, and `last` positions are edited"
            raise AdapterError(text, "leave `use_cache` on, or give the model a `prompt_mask` [rows, length]")
        self.decoding = past(given) > 0
        self.prompt = mask if prompt_mask is None else prompt_mask if mask is None else mask.bool() & prompt_mask.bool()
        self.inside = True
        try:
            return base(*args, **kwargs)
        finally:
            self.inside, self.prompt = False, None

    def ends(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [rows, length, d] -> which positions [rows, length, 1] are among the first and the last of the prompt."""
        everything = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        prompt = everything if self.prompt is None else self.prompt.bool()
        rank = prompt.cumsum(dim=1)
        back = rank[:, -1:] - rank + 1
        first = prompt & (rank <= self.first) & ((rank <= back) | (back > self.last))
        last = prompt & (back <= self.last) & ~first
        return first.unsqueeze(-1), last.unsqueeze(-1)


def generates(host: nn.Module) -> bool:
    """Whether `host` is a model that generates, for which a prompt ends somewhere."""
    return hasattr(host, "can_generate") and bool(host.can_generate())  # type: ignore[operator]


def past(given: Mapping[str, Any]) -> int:
    """How many tokens the cache holds before those that a forward is given."""
    x = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    if x is not None and mask is not None:  # the mask covers both
        return int(mask.shape[1] - x.shape[1])
    return 0 if cache is None else int(cache.get_seq_length())


class Edit(nn.Module):
    """h [..., d] -> R^T (W h + b - R h) [..., d]."""

    def __init__(self, width: int, rank: int, dropout: float, at_base: bool) -> None:
        super().__init__()
        self.rotation = nn.Parameter(torch.empty(rank, width))  # A
        self.source = Linear(width, rank)  # W and b
        self.dropout = nn.Dropout(dropout)
        nn.init.orthogonal_(self.rotation)
        if at_base:
            nn.init.zeros_(self.source.bias)
            with torch.no_grad():
                self.source.weight.copy_(self.orthonormal())

    def orthonormal(self) -> Tensor:
        """R [r, d]."""
        Q, S = torch.linalg.qr(self.rotation.float().T)
        R: Tensor = (Q * torch.where(S.diagonal() < 0, -1.0, 1.0)).T
        return R

    def forward(self, h: Tensor) -> Tensor:
        R = self.orthonormal()
        inner = F.linear(h, (self.source.weight - R).to(h.dtype), self.source.bias.to(h.dtype))
        edited: Tensor = self.dropout(inner) @ R.to(h.dtype)
        return edited


class LoReFT(Adapter):
    """... -> h' [rows, length, d], what the block returns, edited at some positions."""

    def __init__(self, where: Positions, edits: Mapping[str, Edit]) -> None:
        super().__init__()
        vars(self)["where"] = where  # around the model, not a part of this
        self.edits = nn.ModuleDict(edits)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        where: Positions = vars(self)["where"]
        returned = base(*args, **kwargs)
        if not where.inside:
            text = f"reft: a block was called from outside {type(where.host).__name__}, where its positions are known"
            raise AdapterError(text, "call the model that the adapter was attached to, not a part of it")
        return returned if where.decoding else changed(returned, lambda h: self.edited(h, *where.ends(h)))

    def edited(self, h: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """`h` edited at `first` and at `last`, by one edit or by one each."""
        for end, edit in self.edits.items():
            at = {"first": first, "last": last, "both": first | last}[end]
            h = torch.where(at, h + edit(h), h)
        return h


@register
@dataclass(frozen=True, kw_only=True)
class ReFT(Targeted):
    """Edits of hidden states at the ends of the prompt: the fewest parameters of all, the weights stay as they are."""

    target_modules: str | list[str] = "blocks"
    """`blocks` (all), or some of them, as names or a regular expression; `layers_to_transform` picks by number."""
    r: Count = 8
    """Rank of an edit."""
    first: Natural = 7
    """How many of the first tokens of the prompt are edited."""
    last: Natural = 7
    """How many of the last tokens of the prompt are edited."""
    tie_weights: bool = True
    """Use one edit for both ends of the prompt, instead of one each."""
    dropout: Probability = 0.0
    """Fraction of the r differences W h + b - R h dropped in training."""
    init_weights: bool = True
    """Start exactly at the base (W as R, b at zero); false draws W and b at random."""

    peft_type: ClassVar[str] = "REFT"
    learning_rate: ClassVar[float] = 9e-4
    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2404.03592"
    reads_tokens: ClassVar[bool] = True
    merges: ClassVar[str] = "not: it edits hidden states at some positions, no weights"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def __post_init__(self) -> None:
        if not self.first + self.last:
            raise ValueError("`first` and `last` are both zero, so nothing is edited; hint: the paper has 7 and 7")

    def targets(self, model: nn.Module) -> list[Site]:
        stage = around(model)
        names: str | list[str] = self.target_modules
        if names == "blocks":
            names = exactly(site.name for site in blocks(model) if within(site.name, stage.name))
        found = find(model, names, exclude=self.exclude_modules, saved=self.modules_to_save, adapts=self.adapts)
        if strays := [site.name for site in found if not within(site.name, stage.name)]:
            text = "method.target_modules: `{}` lies outside `{}`, which is what reads the prompt"
            raise AdapterError.of([Problem(text.format(name, stage.name)) for name in strays])
        chosen = [s for s in found if in_layers(f"{s.name}.", self.layers_to_transform, self.layers_pattern)]
        if not chosen:
            raise AdapterError(f"method.layers_to_transform: {type(model).__name__} has no such block")
        return chosen

    def sites(self, model: nn.Module) -> list[Site]:
        return [around(model), *super().sites(model)]

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        if self.r > width(model):
            raise AdapterError(f"method.r: {self.r} orthonormal rows do not fit into the width {width(model)}")
        where = Positions(self.first, self.last)
        saved = {site.name for site in self.saved(model)}
        rest = [
            Trained(module) if name in saved else LoReFT(where, {end: self.edit(model) for end in self.ends()})
            for name, module in sites[1:]
        ]
        return [where, *rest]

    def ends(self) -> list[str]:
        """What there is an edit for."""
        if self.tie_weights:
            return ["both"]
        return [end for end, tokens in (("first", self.first), ("last", self.last)) if tokens]

    def edit(self, model: nn.Module) -> Edit:
        """One edit at its start."""
        return Edit(width(model), self.r, self.dropout, self.init_weights)

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return (
            DEFAULTS
            | self.placed(adapters, LoReFT)
            | {
                "r": self.r,
                "first": self.first,
                "last": self.last,
                "tie_weights": self.tie_weights,
                "dropout": self.dropout,
                "init_weights": self.init_weights,
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> ReFT:
        read = Reader(config, place)
        read.supported(DEFAULTS, set(DEFAULTS))
        names = sorted({key.partition(".edits.")[0] for key in shapes if key.endswith(".rotation")})
        if not names:
            read.wrong("peft_type", "the tensor file beside it holds no LoReFT")
        first, last = (read.count(key, DEFAULTS[key], least=0) for key in ("first", "last"))
        if not first + last:
            read.wrong("first", "it is zero, and so is `last`")
        fields: dict[str, Any] = {
            "r": read.count("r", DEFAULTS["r"]),
            "first": first,
            "last": last,
            "tie_weights": read.flag("tie_weights", True),
            "dropout": read.number("dropout", 0.0, most=1),
            "init_weights": read.flag("init_weights", True),
            "target_modules": names,
            "modules_to_save": read.saved(shapes),
        }
        read.done()
        return cls(**fields)


def around(model: nn.Module) -> Site:
    """What is given the prompt with its padding: the model, or its encoder where it has a decoder too."""
    if not has_decoder(model):
        return Site("", model)
    encoder = model.get_encoder()  # type: ignore[operator]
    return next(site for site in modules(model) if site.module is encoder)


def within(name: str, stage: str) -> bool:
    """Whether the module `name` lies in `stage`."""
    return not stage or name.startswith(f"{stage}.")


DEFAULTS: dict[str, Any] = {
    "r": 8,
    "first": 7,
    "last": 7,
    "tie_weights": True,
    "dropout": 0.0,
    "init_weights": True,
    "target_modules": None,
    "modules_to_save": None,
}
"""The keys of its adapter_config.json, which HF PEFT does not know, and what they are when left out."""
