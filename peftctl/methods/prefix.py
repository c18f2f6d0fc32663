"""Prefix tuning: keys and values before the input in every layer, trained. Li & Liang 2021, arXiv:2101.00190.

h_i = P[i]               for i among the n virtual tokens     (eq. 3)
h_i = model(x_i, h_<i)   otherwise
P = MLP(E)               with `projection`                    (sec. 4.3)

P [n, 2 layers * heads * d]: a key and a value of every layer for every virtual token, heads and d those of keys and
values. E [n, heads * d], the MLP has the widths heads * d, h, 2 layers * heads * d with tanh between them. Without the
projection P itself is trained: P-tuning v2 (Liu et al. 2021, arXiv:2110.07602).

Keys are taken as they are: no rotary embedding turns them. A model with encoder and decoder has the prefix in its
decoder's self-attention. HF PEFT's file holds P alone; the MLP is kept beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftctl.config.block import Count
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, has_decoder, modules
from peftctl.engine.method import register
from peftctl.engine.peft_config import Reader
from peftctl.engine.prompt_method import VirtualTokens, config_of, embedding
from peftctl.engine.virtual_tokens import Virtual, counted, refuse_short, refuse_unusual, tokens, widened
from peftctl.errors import AdapterError


class Projection(nn.Module):
    """Nothing -> P [n, 2 layers * heads * d]."""

    def __init__(self, n: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n, width))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 2 * layers * width))

    def forward(self) -> Tensor:
        made: Tensor = self.mlp(self.embedding)
        return made


class KeysAndValues(Virtual):
    """ids [rows, length] -> what the host makes of them, having keys and values of n more positions in every layer.

    vectors [n, 2 layers * heads * d]: the key of layer i is block 2i of heads * d numbers, its value the next one.
    HF PEFT reads the blocks of a decoder that has an encoder in another order: those of layer 2i mod layers.
    """

    cached = True

    def __init__(self, n: int, source: Tensor | nn.Module, layers: int, heads: int, decoder: bool = False) -> None:
        super().__init__(n, source)
        self.layers, self.heads, self.decoder = layers, heads, decoder

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.host.modules()):
            text = "prefix: it needs the key/value cache, and gradient checkpointing turns that off"
            raise AdapterError(text, "train without `gradient_checkpointing`, or with `prompt` or `p_tuning`")
        given = self.named(args, kwargs)
        before, key = self.put_before(), "decoder_attention_mask" if self.decoder else "attention_mask"
        cache = given.setdefault("past_key_values", new_cache(self.decoder))
        refuse_unusual(given.get(key), given.get("position_ids"), cache)
        if cache.get_seq_length() == before:
            self.fill(cache, rows(given))
        if key in given:
            own = given[key][:, before:]
            given[key] = widened(given[key], self.n, before, first=True)
            refuse_short(given, key)
            if self.counts and not self.decoder and "position_ids" not in given:
                given["position_ids"] = before + counted(own)[:, -tokens(given) :]
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"] + self.n
        returned = base(**given)
        if given.get("use_cache") is False and "past_key_values" in returned:
            rest = {name: value for name, value in returned.items() if name != "past_key_values"}
            returned = type(returned)(**rest)  # nobody asked for the cache, and generation would use it again
        return returned

    def fill(self, cache: Any, rows: int) -> None:
        """Put keys and values [rows, heads, n, d] of every layer into the cache."""
        own = getattr(cache, "self_attention_cache", cache)
        vectors = self.vectors().to(self.host.dtype)  # type: ignore[arg-type]
        blocks = vectors.view(self.n, 2 * self.layers, self.heads, -1).permute(1, 2, 0, 3)
        for layer in range(self.layers):
            pair = 2 * layer % self.layers if self.decoder else layer
            key, value = (block.expand(rows, -1, -1, -1) for block in blocks[2 * pair : 2 * pair + 2])
            own.update(key, value, layer)


@register
@dataclass(frozen=True, kw_only=True)
class Prefix(VirtualTokens):
    """Trained keys and values in every layer: more of them than `prompt` has embeddings, and stronger."""

    projection: bool = False
    """Train a network that makes the prefix, instead of the prefix itself: steadier, slower."""
    encoder_hidden_size: Count | None = None
    """h, with `projection`; the width of a layer's keys when left out."""
    init: Literal["random", "zero"] = "random"
    """How the prefix starts, where it is trained itself: as small random numbers, or as zeros."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    learning_rate: ClassVar[float] = 5e-3  # P-tuning v2 has up to 1e-2, HF PEFT's benchmark 1e-3
    paper: ClassVar[str] = "Li & Liang 2021, arXiv:2101.00190"
    clashes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "trainer.gradient_checkpointing": (
            "prefix needs the key/value cache, and gradient checkpointing turns it off",
            "use `prompt` or `p_tuning`, or train without it",
        )
    }
    own: ClassVar[Mapping[str, Any]] = {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False}

    def reading(self, model: nn.Module) -> list[Site]:
        embedding(model)
        refuse_other_caches(model)
        base = getattr(model, "base_model", model)
        for site in modules(model):
            if site.module in (model, base) and "past_key_values" in inspect.signature(site.module.forward).parameters:
                return [site]
        raise AdapterError(f"method: {type(model).__name__} takes no keys and values from a cache", "use `prompt`")

    def readers(self, model: nn.Module, sites: list[Site]) -> list[Adapter]:
        layers, heads, _ = shape(model)
        n, decoder = self.num_virtual_tokens, has_decoder(model)
        return [KeysAndValues(n, self.source(model, n), layers, heads, decoder)]

    def source(self, model: nn.Module, rows: int) -> Tensor | nn.Module:
        layers, heads, width = shape(model)
        width *= heads
        if self.projection:
            return Projection(rows, width, self.encoder_hidden_size or width, layers)
        start = torch.zeros(rows, 2 * layers * width)
        return start if self.init == "zero" or start.is_meta else start.normal_(std=START)

    def peft_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        made = super().peft_config(adapters)
        layers, heads, width = shape(next(a.host for a in adapters.values() if isinstance(a, KeysAndValues)))
        return made | {
            "encoder_hidden_size": self.encoder_hidden_size or heads * width,
            "init_weights": "zero" if self.init == "zero" else None,
            "num_attention_heads": heads,
            "num_layers": layers,
            "prefix_projection": self.projection,
            "token_dim": heads * width,
        }

    @classmethod
    def own_fields(cls, read: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        hidden = read.config.get("encoder_hidden_size")
        read.flag("prefix_projection")
        return {
            "projection": any(key.startswith("encoder.") for key in shapes),
            "encoder_hidden_size": None if hidden is None else read.count("encoder_hidden_size", 1),
            "init": "zero" if read.config.get("init_weights") == "zero" else "random",
        }


START = 0.02
"""Standard deviation of a prefix at its start: attention to it is then even, and it adds almost nothing."""


def shape(model: nn.Module) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their width, of the decoder or the only stack."""
    config = config_of(model)
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, width or config.hidden_size // config.num_attention_heads


def refuse_other_caches(model: nn.Module) -> None:
    """Raise AdapterError for a model whose cache is more than the keys and values of every layer."""
    from transformers import DynamicCache

    config = config_of(model)
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"}
    if kinds:
        names = ", ".join(sorted(kinds))
        text = f"method: {type(model).__name__} has layers whose cache does not keep all keys ({names})"
        raise AdapterError(text, "use `prompt` or `p_tuning`")
    depths = {getattr(config, key, None) for key in ("num_hidden_layers", "num_decoder_layers", "decoder_layers")}
    if has_decoder(model) and len(depths - {None}) > 1:
        raise AdapterError("method: encoder and decoder of different depth are not supported", "use `prompt`")


def rows(given: dict[str, Any]) -> int:
    """How many rows a forward is given."""
    found = next(given[key] for key in ("input_ids", "inputs_embeds", "encoder_outputs") if key in given)
    return len(found if isinstance(found, Tensor) else found[0])


def new_cache(decoder: bool) -> Any:
    """An empty cache."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if decoder else DynamicCache()
