"""Virtual tokens: n learned vectors that a model reads beside the tokens of each row, which it never sees as ids.

Two ways in: into the input, as embeddings before the first token (`Prepended`); into the cache, as keys and values of
every layer (the method `prefix`). Callers see neither: they give and get what they would without, row for row and
column for column, logits as long as their ids.

In a row that is padded on the left, virtual tokens in the input stand between the padding and the first token, so that
the row is what it would be alone. Prefixes stand before the padding, and positions are counted without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftctl.engine.adapter import Adapter, Stack
from peftctl.errors import AdapterError, NotMergeable

ALIGNED = {"labels": -100, "token_type_ids": 0}
"""Inputs [rows, length] beside ids, mask and positions -> what they say of a virtual token."""

PER_TOKEN = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}
"""Outputs with a column for each token -> how many dimensions they have then."""


class Widening(Adapter):
    """Around what reads the tokens of a row: it reads n more."""

    cached: ClassVar[bool] = False
    """Whether they are put into the cache, not into the input."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        text = f"the method gives the model {self.n} virtual tokens to read, which no weight of it can hold"
        raise NotMergeable(text, "keep the adapter beside its base")

    def peft_key(self, site: str, leaf: str) -> str:
        return leaf

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the host's forward by name, those of them that are set."""
        given = dict(zip(self.parameters_of_host(), args, strict=False)) | kwargs
        given.pop("cache_position", None)  # of earlier transformers; the model counts again, virtual tokens included
        return {key: value for key, value in given.items() if value is not None}

    def parameters_of_host(self) -> list[str]:
        """What the host's forward takes."""
        return list(inspect.signature(self.host.forward).parameters)

    @property
    def counts(self) -> bool:
        """Whether positions are to be counted by the mask: in decoders. Others count columns, some with an offset."""
        generates = getattr(self.host, "can_generate", bool)()
        return generates and "position_ids" in self.parameters_of_host()

    def put_before(self) -> int:
        """How many virtual tokens the active prefixes further out have put into the cache in this forward."""
        stack = self.host.adapters
        assert isinstance(stack, Stack)
        active = [cast(Adapter, stack[name]) for name in stack.active]
        return sum(a.n for a in active[active.index(self) + 1 :] if isinstance(a, Widening) and a.cached)


class Virtual(Widening):
    """Holds the vectors [rows, width]: a parameter `prompt_embeddings`, or what a network makes of fewer numbers.

    HF PEFT's file has the vectors alone; the network is kept beside, and a folder without one has a parameter.
    """

    def __init__(self, n: int, source: Tensor | nn.Module) -> None:
        super().__init__(n)
        self.encoder: nn.Module | None = None
        if isinstance(source, Tensor):
            self.prompt_embeddings = nn.Parameter(source)
        else:
            self.encoder = source

    def vectors(self) -> Tensor:
        """In float32, as the model is to read them."""
        return self.prompt_embeddings if self.encoder is None else cast(Tensor, self.encoder())

    def exported(self) -> dict[str, Tensor]:
        if self.encoder is None:
            return {"prompt_embeddings": self.vectors()}
        training = self.encoder.training
        self.encoder.eval()  # no dropout
        with torch.no_grad():
            vectors = self.vectors()
        self.encoder.train(training)
        return {"prompt_embeddings": vectors}

    def continue_from(self, earlier: Adapter) -> None:
        if isinstance(earlier, Virtual) and self.encoder is not None and earlier.encoder is None:
            text = "it has the vectors alone, not the network that made them"
            raise AdapterError(text, "train the vectors themselves: `encoder: none`, or `projection: false`")
        super().continue_from(earlier)

    def private(self) -> dict[str, Tensor]:
        return {} if self.encoder is None else self.state_dict(keep_vars=True)


class Prepended(Virtual):
    """ids [rows, length] -> what the host makes of them, having read n embeddings before those of the ids."""

    def __init__(self, n: int, source: Tensor | nn.Module, encoder: bool = False) -> None:
        super().__init__(n, source)
        self.inside = encoder  # of a model with a decoder, which reads the virtual tokens' states too

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self.named(args, kwargs)
        before, mask, cache = self.put_before(), given.get("attention_mask"), given.get("past_key_values")
        refuse_unusual(mask, given.get("position_ids"), cache)
        if cache is not None and cache.get_seq_length() > before:
            return base(**self.continued(given, before))
        if "inputs_embeds" not in given:
            given["inputs_embeds"] = self.host.get_input_embeddings()(given.pop("input_ids"))  # type: ignore[operator]
        embeds = given["inputs_embeds"]
        given.pop("input_ids", None)
        rows, length = embeds.shape[:2]
        pads = None if mask is None else padding(mask[:, before:])
        vectors = self.vectors()[: self.n].to(embeds)
        given["inputs_embeds"] = woven(vectors.expand(rows, -1, -1), embeds, pads)
        if mask is not None and (mask.shape[1] == before + length or not self.inside):
            given["attention_mask"] = widened(mask, self.n, before)
        for key, value in ALIGNED.items():
            told = given.get(key)
            if told is not None and told.shape == (rows, length) and not told.is_floating_point():
                given[key] = woven(told.new_full((rows, self.n), value), told, pads)
        for key in ("start_positions", "end_positions"):
            if key in given:
                given[key] = given[key] + self.n
        given |= self.placed(given, before, pads, length)
        keep = given.get("logits_to_keep", 0)
        if isinstance(keep, Tensor):
            given["logits_to_keep"] = keep + self.n
        elif keep:
            given["logits_to_keep"] = min(keep, length)
        returned = base(**given)
        return returned if self.inside else narrowed(returned, self.n, length)

    def continued(self, given: dict[str, Any], before: int) -> dict[str, Any]:
        """The arguments of a forward whose cache has the virtual tokens."""
        if "attention_mask" in given:
            given["attention_mask"] = widened(given["attention_mask"], self.n, before)
            refuse_short(given)
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"] + self.n
        elif self.counts and "attention_mask" in given:
            given["position_ids"] = counted(given["attention_mask"])[:, -tokens(given) :]
        return given

    def placed(self, given: dict[str, Any], before: int, pads: Tensor | None, length: int) -> dict[str, Tensor]:
        """The positions of virtual tokens and tokens; empty where the host counts them itself."""
        if "position_ids" in given:
            theirs = given["position_ids"]
            ours = torch.arange(before, before + self.n, device=theirs.device).to(theirs)
            return {"position_ids": woven(ours.expand(len(theirs), -1), theirs + self.n, pads)}
        if not self.counts or "attention_mask" not in given:
            return {}
        return {"position_ids": counted(given["attention_mask"])[:, -(self.n + length) :]}


class Widened(Widening):
    """Around a model with encoder and decoder: what the decoder sees of the encoder is n longer."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self.named(args, kwargs)
        mask = given.get("attention_mask")
        refuse_unusual(mask, None, None)
        return base(**given | ({} if mask is None else {"attention_mask": widened(mask, self.n)}))


def woven(virtual: Tensor, own: Tensor, pads: Tensor | None) -> Tensor:
    """virtual [rows, n, ...], own [rows, length, ...] -> [rows, n + length, ...]: virtual after `pads` of own."""
    joined = torch.cat([virtual, own], dim=1)
    if pads is None:
        return joined
    n, pads = virtual.shape[1], pads.unsqueeze(1)
    to = torch.arange(joined.shape[1], device=joined.device).expand(len(joined), -1)
    at = torch.where(to < pads, to + n, torch.where(to < pads + n, to - pads, to))
    return joined[torch.arange(len(joined), device=joined.device).unsqueeze(1), at]


def padding(mask: Tensor) -> Tensor:
    """How many columns [rows] of a mask [rows, length] come before the first token."""
    return (mask.cumsum(dim=1) == 0).sum(dim=1)


def widened(mask: Tensor, n: int, before: int = 0, first: bool = False) -> Tensor:
    """A mask [rows, length] of n columns more, behind its first `before` ones and the padding, or `first` of all."""
    ones = mask.new_ones(len(mask), n)
    if first:
        return torch.cat([ones, mask], dim=1)
    return torch.cat([mask[:, :before], woven(ones, mask[:, before:], padding(mask[:, before:]))], dim=1)


def counted(mask: Tensor) -> Tensor:
    """The positions [rows, length] of tokens, padding not counted."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def narrowed(returned: Any, n: int, length: int) -> Any:
    """What the model returned, without the columns of virtual tokens."""
    if isinstance(returned, tuple):
        hint = "call the model with `return_dict=True`"
        raise AdapterError("virtual tokens: outputs without names cannot be cut", hint)
    for key, dimensions in PER_TOKEN.items():
        value = returned.get(key)
        if value is not None and value.ndim == dimensions and value.shape[1] == n + length:
            returned[key] = value[:, n:]
    return returned


def tokens(given: dict[str, Any]) -> int:
    """How many columns of tokens a forward is given."""
    return int((given["input_ids"] if "input_ids" in given else given["inputs_embeds"]).shape[1])


def refuse_unusual(mask: Tensor | None, positions: Tensor | None, cache: Any) -> None:
    """Raise AdapterError for what virtual tokens cannot be put into."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        text = "virtual tokens: expected an attention mask [rows, length]"
        raise AdapterError(text, "give one that says which tokens are no padding; static caches make another")
    if positions is not None and positions.ndim != 2:
        raise AdapterError("virtual tokens: positions of several dimensions, as of pictures, are not supported")
    plain = getattr(cache, "self_attention_cache", cache)
    others = {type(layer).__name__ for layer in getattr(plain, "layers", ())} & STATIC
    if others:
        text = f"virtual tokens: a cache of {', '.join(sorted(others))} has no room for them"
        raise AdapterError(text, "leave `cache_implementation` out")


STATIC = {"StaticLayer", "StaticSlidingWindowLayer"}
"""Layers of caches whose size is fixed before they are filled."""


def refuse_short(given: dict[str, Any], key: str = "attention_mask") -> None:
    """Raise AdapterError for a cache that has fewer tokens than the mask counts: one made without virtual tokens."""
    if key == "attention_mask" and given[key].shape[1] > given["past_key_values"].get_seq_length() + tokens(given):
        text = "virtual tokens: the cache was made without them, or cut"
        raise AdapterError(text, "make it with the adapter active; assisted generation is not supported")
