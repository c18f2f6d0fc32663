"""Single tokens that are trained: their rows of an embedding, and of the output head that shares its weight.

HF PEFT's `trainable_token_indices`: for new tokens, at a thousandth of the cost of the whole embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftctl.config.quote import quoted
from peftctl.engine import hosts
from peftctl.engine.adapter import Adapter
from peftctl.engine.anatomy import Site, ends_with, modules
from peftctl.engine.peft_config import Reader
from peftctl.errors import AdapterError, Problem

Indices = Sequence[int] | Mapping[str, Sequence[int]]
"""Tokens of the input embedding, or of modules by name."""


class TokenRows(Adapter):
    """Rows that replace those of `tokens` in the host's weight [rows, width].

    Around an embedding: ids [...] -> y [..., width]; around a linear, the output head: x [..., width] -> y [..., rows].
    """

    tokens: Tensor
    ordered: Tensor
    order: Tensor

    def __init__(self, host: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        weight = host.get_parameter("weight")
        free = weight.is_meta or torch.get_default_device().type == "meta"
        rows = torch.zeros(len(tokens), weight.shape[1]) if free else weight[list(tokens)].detach().float()
        self.trainable_tokens_delta = nn.Parameter(rows)  # HF PEFT's name for what is the row itself
        ordered, order = torch.tensor(list(tokens)).sort()
        for name, index in (("tokens", torch.tensor(list(tokens))), ("ordered", ordered), ("order", order)):
            self.register_buffer(name, index, persistent=False)

    @property
    def trained(self) -> TokenRows:
        """Where the rows are."""
        return self

    def forward(self, base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, rows = base(x, *args, **kwargs), self.trained.trainable_tokens_delta.to(x.device)
        tokens, ordered, order = (
            t.to(x.device) for t in (self.trained.tokens, self.trained.ordered, self.trained.order)
        )
        if not isinstance(self.host, nn.Embedding):
            bias = hosts.bias(self.host)
            return y.index_copy(-1, tokens, F.linear(x, rows.to(x.dtype), None if bias is None else bias[tokens]))
        at = torch.searchsorted(ordered, x.long().contiguous()).clamp(max=len(ordered) - 1)
        new = F.embedding(order[at], rows).to(y.dtype) * getattr(self.host, "embed_scale", 1.0)  # as Gemma does
        return torch.where((ordered[at] == x).unsqueeze(-1), new, y)

    def merged(self, value: Tensor, name: str = "weight") -> Tensor:
        if name != "weight":
            return value
        rows, tokens = self.trained.trainable_tokens_delta.detach(), self.trained.tokens
        return value.index_copy(0, tokens.to(value.device), rows.to(value))

    def continue_from(self, earlier: Adapter) -> None:
        if isinstance(earlier, TokenRows) and not torch.equal(earlier.trained.tokens, self.trained.tokens):
            raise AdapterError("other tokens are trained there", "give the same `trainable_token_indices`")
        super().continue_from(earlier)

    def peft_key(self, site: str, leaf: str) -> str:
        return super().peft_key(site, f"token_adapter.{leaf}")


class TiedTokenRows(TokenRows):
    """The rows of `leader` in a host that shares the weight of the leader's; on disk it is nothing."""

    def __init__(self, leader: TokenRows) -> None:
        Adapter.__init__(self)
        vars(self)["follows"] = leader  # no child: each stays on the device of its own host

    @property
    def trained(self) -> TokenRows:
        assert isinstance(self.follows, TokenRows)
        return self.follows


class Rows(NamedTuple):
    """One module of which rows are trained."""

    site: Site
    tokens: Sequence[int]
    leader: str | None = None
    """The module whose weight it shares, and whose rows it follows."""


def rows_of(model: nn.Module, indices: Indices | None) -> list[Rows]:
    """Every module that `indices` names, and those that share the weight of one, each after its leader.

    Raises AdapterError, with everything wrong, for names that match nothing and tokens that are not there.
    """
    named = dict(by_name(model, indices)) if indices is not None else {}
    if problems := [p for site, tokens in named.values() for p in mistakes(site, tokens)]:
        raise AdapterError.of(problems)
    leaders: dict[int, tuple[Site, Sequence[int]]] = {}
    found = []
    for site, tokens in named.values():
        leader, same = leaders.setdefault(id(site.module.get_parameter("weight")), (site, tokens))
        if leader is site or list(same) != list(tokens):
            found.append(Rows(site, tokens))
    for site in unique(model):
        leader, tokens = leaders.get(id(site.module._parameters.get("weight")), (site, ()))
        if leader is not site and all(site.module is not row.site.module for row in found):
            found.append(Rows(site, tokens, leader.name))
    return found


def build_rows(rows: Sequence[Rows]) -> list[Adapter]:
    """The adapters for `rows`."""
    leaders = {row.site.name: TokenRows(row.site.module, row.tokens) for row in rows if row.leader is None}
    return [leaders[row.site.name] if row.leader is None else TiedTokenRows(leaders[row.leader]) for row in rows]


def by_name(model: nn.Module, indices: Indices) -> Iterator[tuple[str, tuple[Site, Sequence[int]]]]:
    """Module name -> the module and its tokens."""
    if not isinstance(indices, Mapping):
        getter = getattr(model, "get_input_embeddings", None)
        embedding = getter() if getter else None
        site = next((site for site in unique(model) if site.module is embedding), None)
        if site is None:
            text = (
                f"method.trainable_token_indices: {type(model).__name__} does not tell which embedding is its input's"
            )
            raise AdapterError(text, "give a mapping: name of the embedding -> tokens")
        yield site.name, (site, indices)
        return
    for entry, tokens in indices.items():
        sites = [site for site in unique(model) if ends_with(site.name, entry)]
        if not sites:
            have = ", ".join(f"`{s.name}`" for s in unique(model) if isinstance(s.module, nn.Embedding))
            text = f"method.trainable_token_indices: `{entry}` matches no module of {type(model).__name__}"
            raise AdapterError(text, f"embeddings: {have}" if have else None)
        yield from ((site.name, (site, tokens)) for site in sites)


def unique(model: nn.Module) -> Iterator[Site]:
    """Every module of the base model once, by its first name."""
    seen: set[int] = set()
    for site in modules(model):
        if id(site.module) not in seen:
            seen.add(id(site.module))
            yield site


def mistakes(site: Site, tokens: Sequence[int]) -> Iterator[Problem]:
    """What is wrong with training the rows `tokens` of `site`."""
    place = "method.trainable_token_indices"
    if hosts.kind(site.module) not in ("Embedding", "Linear"):
        yield Problem(f"{place}: `{site.name}` is a {type(site.module).__name__}, no embedding and no output head")
        return
    count = len(site.module.get_parameter("weight"))
    if not tokens:
        yield Problem(f"{place}: no tokens of `{site.name}` are given")
    if beyond := [token for token in tokens if not 0 <= token < count]:
        yield Problem(f"{place}: `{site.name}` has no row {beyond[0]}", f"its rows are 0 to {count - 1}")
    if len(set(tokens)) < len(tokens):
        yield Problem(f"{place}: a token of `{site.name}` is given twice")


def read_indices(read: Reader) -> list[int] | dict[str, list[int]] | None:
    """`trainable_token_indices` of a config that a stranger wrote."""
    key = "trainable_token_indices"
    value = read.config.get(key)
    lists = list(value.values()) if isinstance(value, dict) else [value]
    whole = all(isinstance(part, list) and all(type(token) is int for token in part) for part in lists)
    if value is None or whole:
        return value
    read.wrong(key, f"expected a list of numbers, or a mapping of names to such; got {quoted(str(value))}")
    return None
