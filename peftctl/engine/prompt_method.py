"""Methods that give a model virtual tokens to read: where they attach, and HF PEFT's form of them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftctl.config.block import Count
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, has_decoder, modules
from peftctl.engine.method import Method, to_save
from peftctl.engine.peft_config import Reader
from peftctl.engine.trained import Trained
from peftctl.engine.virtual_tokens import Prepended, Virtual, Widened, Widening
from peftctl.errors import AdapterError

COMMONEST = 5000
"""Tokens that a random choice is made from, the first of the vocabulary: in most the commonest (Lester, sec. 3.2)."""

PEFT: dict[str, Any] = {
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "token_dim": None,
}
"""The keys that HF PEFT's configs of all three have, with its defaults."""


class Saved(Trained):
    """A module trained whole, by the name that HF PEFT gives it beside virtual tokens."""

    def peft_key(self, site: str, leaf: str) -> str:
        return super().peft_key(site, leaf).replace("base_model.model.", "base_model.", 1)


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(Method):
    """A method around the whole model."""

    num_virtual_tokens: Count = 20
    """Number of virtual tokens."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained whole beside them, such as a classification head."""

    reads_tokens: ClassVar[bool] = True
    merges: ClassVar[str] = "not: it gives the model more to read and changes no weight"

    own: ClassVar[Mapping[str, Any]] = {}
    """The keys of HF PEFT's config that this method alone has, with its defaults."""

    def reading(self, model: nn.Module) -> list[Site]:
        """What reads the virtual tokens: the model; with a decoder, its encoder first of all."""
        embedding(model)
        refuse_last_token(model)
        if not has_decoder(model):
            return [Site("", model)]
        encoder = model.get_encoder()  # type: ignore[operator]
        return [Site("", model), next(site for site in modules(model) if site.module is encoder)]

    def sites(self, model: nn.Module) -> list[Site]:
        return self.reading(model) + to_save(model, self.modules_to_save)

    def build(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        number = len(sites) - len(to_save(model, self.modules_to_save))
        return self.readers(model, sites[:number]) + [Saved(site.module) for site in sites[number:]]

    def readers(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        """The adapters of `reading`."""
        n, decoder = self.num_virtual_tokens, len(sites) > 1
        rows = 2 * n if decoder else n  # HF PEFT keeps n for the decoder, which reads none of them
        source = self.source(model, rows)
        return [Widened(n), Prepended(n, source, encoder=True)] if decoder else [Prepended(n, source)]

    def source(self, model: nn.Module, rows: int) -> Tensor | nn.Module:
        """The vectors [rows, width] as they start, or what makes them."""
        raise NotImplementedError

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        virtual = next(adapter for adapter in adapters.values() if isinstance(adapter, Virtual))
        model = adapters[min(name for name, adapter in adapters.items() if isinstance(adapter, Widening))].host
        return (
            PEFT
            | dict(self.own)
            | {
                "modules_to_save": sorted(self.modules_to_save) or None,
                "num_attention_heads": config_of(model).num_attention_heads,
                "num_layers": config_of(model).num_hidden_layers,
                "num_transformer_submodules": 2 if has_decoder(model) else 1,
                "num_virtual_tokens": self.num_virtual_tokens,
                "token_dim": virtual.exported()["prompt_embeddings"].shape[1],
            }
        )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str) -> Self:
        read = Reader(config, place)
        read.supported(PEFT | dict(cls.own), set(PEFT) | set(cls.own))
        if "num_virtual_tokens" not in config:
            read.wrong("num_virtual_tokens", "missing")
        fields = {
            "num_virtual_tokens": read.count("num_virtual_tokens", 20),
            "modules_to_save": read.saved(shapes),
            **cls.own_fields(read, shapes),
        }
        read.done()
        return cls(**fields)

    @classmethod
    def own_fields(cls, read: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The fields that this method alone has."""
        raise NotImplementedError


def config_of(model: nn.Module) -> Any:
    """The configuration of what reads text in `model`."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def embedding(model: nn.Module) -> nn.Embedding:
    """What turns ids into what virtual tokens are like; raises AdapterError for a model that reads no text."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Embedding):
        text = f"method: {type(model).__name__} reads no tokens, so it can read no virtual ones"
        raise AdapterError(text, "choose a method that adapts weights, such as `lora`")
    return found


def refuse_last_token(model: nn.Module) -> None:
    """Raise AdapterError for a classifier that looks for the last token by its id, which embeddings do not have."""
    takes = getattr(model.forward, "__wrapped__", model.forward).__code__.co_varnames
    if type(model).__name__.endswith("ForSequenceClassification") and "past_key_values" in takes:
        text = f"method: {type(model).__name__} finds the last token of a row by its id, and virtual tokens have none"
        raise AdapterError(text, "use `prefix`, which leaves the ids as they are")


def vocabulary(model: nn.Module, rows: int) -> Tensor:
    """Embeddings [rows, width] of random tokens among the commonest; free under `torch.device("meta")`."""
    weight = embedding(model).weight
    if weight.is_meta or torch.get_default_device().type == "meta":
        return torch.zeros(rows, weight.shape[1])
    ids = torch.randint(min(COMMONEST, len(weight)), (rows,), device="cpu")
    return weight.detach()[ids.to(weight.device)].float().clone()


def alike(model: nn.Module, rows: int) -> Tensor:
    """Random vectors [rows, width], as large as the embeddings of the commonest tokens."""
    weight = embedding(model).weight
    if weight.is_meta or torch.get_default_device().type == "meta":
        return torch.zeros(rows, weight.shape[1])
    return torch.randn(rows, weight.shape[1], device="cpu") * weight.detach()[:COMMONEST].float().std().cpu()
