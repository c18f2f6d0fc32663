"""Causal attention over rows of different lengths, each seeing itself and what all rows begin with.

    o = softmax(q k^T / sqrt(width)) v,    heads of queries share those of keys (Ainslie et al. 2023, arXiv:2305.13245)

computed for a few hundred queries at a time, so that half of what a mask would throw away is never computed.
Probabilities of short rows are kept for the gradient, those of long ones computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftctl.fast.plain import Plain
from peftctl.fast.rows import Group, Rows

BLOCK = 256
"""Queries at a time."""

KEPT = 512
"""Longest rows whose probabilities are kept."""

Turn = tuple[Tensor, Tensor]
"""Cosine and sine [tokens, width] of the angles that positions turn queries and keys by (Su et al. 2021)."""


@dataclass
class Kept:
    """What a group's gradient needs."""

    k: Tensor
    v: Tensor
    blocks: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """Queries [rows * key heads, heads * queries, width] and probabilities of each block."""


@dataclass(frozen=True)
class Attention:
    """q [tokens, heads, width], k and v [tokens, key heads, width] -> o as q."""

    kernels: Plain
    scale: float
    window: int
    """How many tokens back a token sees; 0 is all."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, turn: Turn | None, keep: bool) -> tuple[Tensor, Any]:
        """o, and what `backward` needs if it is to be kept."""
        out = torch.empty_like(q)
        kept = [self.group(q, k, v, out, group, rows, turn) for group in rows.groups]
        return out, kept if keep else None

    def keys(self, group: Group, rows: Rows) -> Tensor:
        """Where the keys of a group lie [rows, keys]."""
        if not group.after:
            return group.tokens
        first = torch.arange(rows.shared, device=group.tokens.device).expand(len(group.tokens), -1)
        return torch.cat([first, group.tokens], dim=1)

    def group(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, group: Group, rows: Rows, turn: Turn | None) -> Kept:
        """Write what one group sees into `out`."""
        places = self.keys(group, rows)
        made = Kept(self.kernels.arrange(k, places, turn), self.kernels.arrange(v, places, None))
        keys, values = made.k.flatten(0, 1), made.v.flatten(0, 1)
        for index, start, end in blocks(group):
            turned = self.kernels.arrange(q, index, turn, self.scale)
            queries = turned.view(len(keys), -1, q.shape[2])
            p = self.probabilities(queries, keys, end, start, index.shape[1])
            o = torch.bmm(p, values[:, :end])
            self.kernels.restore_(out, o.view(turned.shape), index, None)
            made.blocks.append((queries, p if end <= KEPT else None))
        return made

    def probabilities(self, queries: Tensor, keys: Tensor, end: int, start: int, length: int) -> Tensor:
        """Of the first `end` keys, for queries the first of which sees those up to `start`."""
        p = torch.bmm(queries, keys[:, :end].transpose(1, 2))
        self.kernels.attend_(p, length, start, self.window)
        return p

    def backward(
        self, do: Tensor, kept: Any, rows: Rows, turn: Turn | None, key_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        tokens, _, width = do.shape
        dq = torch.empty_like(do)
        dk, dv = (do.new_empty(tokens, key_heads, width) for _ in range(2))
        first = [torch.zeros(key_heads, rows.shared, width, device=do.device) for _ in range(2)]
        for group, made in reversed(list(zip(rows.groups, kept, strict=True))):  # the beginning last
            grads = self.group_backward(do, dq, group, made, turn)
            own = group.after
            for into, grad, sums, angle in zip((dk, dv), grads, first, (turn, None), strict=True):
                if own:
                    sums += grad[:, :, :own].sum(dim=0)
                elif rows.shared:
                    grad = grad + sums
                part = grad[:, :, own:].to(into.dtype).contiguous()
                self.kernels.restore_(into, part, group.tokens, angle)
        return dq, dk, dv

    def group_backward(
        self, do: Tensor, dq: Tensor, group: Group, made: Kept, turn: Turn | None
    ) -> tuple[Tensor, Tensor]:
        """Write the gradient of a group's queries; those of its keys and values [rows, key heads, keys, width]."""
        keys, values = made.k.flatten(0, 1), made.v.flatten(0, 1)
        dk, dv = (torch.zeros(keys.shape, device=do.device) for _ in range(2))
        for (index, start, end), (queries, p) in zip(blocks(group), made.blocks, strict=True):
            if p is None:
                p = self.probabilities(queries, keys, end, start, index.shape[1])
            arranged = self.kernels.arrange(do, index, None)
            g = arranged.view(queries.shape)
            dv[:, :end] += torch.bmm(p.transpose(1, 2), g)
            d = torch.bmm(g, values[:, :end].transpose(1, 2))
            self.kernels.attend_backward_(d, p, index.shape[1], start, self.window)
            dk[:, :end] += torch.bmm(d.transpose(1, 2), queries)
            self.kernels.restore_(dq, torch.bmm(d, keys[:, :end]).view(arranged.shape), index, turn, self.scale)
        return dk.view(made.k.shape), dv.view(made.v.shape)


def blocks(group: Group) -> list[tuple[Tensor, int, int]]:
    """Each block of queries: where they lie [rows, queries], the key that the first is, the keys that the last sees."""
    cuts = range(0, group.tokens.shape[1], BLOCK)
    parts = [group.tokens[:, a : a + BLOCK].contiguous() for a in cuts]
    return [(part, group.after + a, group.after + a + part.shape[1]) for a, part in zip(cuts, parts, strict=True)]
