"""Causal attention by torch's own kernels: flash attention (Dao 2023, arXiv:2307.08691) where card and dtype have it.

    o = softmax(q k^T / sqrt(width)) v,    heads of queries share those of keys

Rows of similar length stand beside one another. Their padding stands behind them, where the causal mask hides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from peftctl.fast.attention import Attention, Turn
from peftctl.fast.plain import hidden
from peftctl.fast.rows import Group, Rows


@dataclass(frozen=True)
class Flash(Attention):
    """The same as `Attention`, for rows without a common beginning."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, turn: Turn | None, keep: bool) -> tuple[Tensor, Any]:
        if turn is not None:
            q, k = (self.kernels.turn(one, turn) for one in (q, k))
        if not keep:
            return self.seen(q, k, v, rows), None
        with torch.enable_grad():
            q, k, v = (one.detach().requires_grad_() for one in (q, k, v))
            out = self.seen(q, k, v, rows)
        return out.detach(), ((q, k, v), get_gradient_edge(out))

    def backward(
        self, do: Tensor, kept: Any, rows: Rows, turn: Turn | None, key_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        inside, edge = kept
        dq, dk, dv = torch.autograd.grad(edge, inside, do)
        if turn is not None:
            dq, dk = (self.kernels.turn_back(one, turn) for one in (dq, dk))
        return dq, dk, dv

    def seen(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """o, of queries and keys that are turned."""
        made = [self.of_group(q, k, v, group) for group in rows.groups]
        return made[0] if len(made) == 1 else torch.cat(made)

    def of_group(self, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
        """o [tokens of the group, heads, width]."""
        queries, keys, values = (beside(one, group) for one in (q, k, v))
        heads, length = queries.shape[1], queries.shape[2]
        if not 0 < self.window < length:
            shared = keys.shape[1] != heads
            o = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=shared
            )
        else:  # a mask and shared keys at once are beyond the fast kernels
            keys, values = (one.repeat_interleave(heads // one.shape[1], dim=1) for one in (keys, values))
            mask = hidden(queries[:1, 0, :, :1].expand(1, length, length), length, 0, self.window)
            o = F.scaled_dot_product_attention(queries, keys, values, mask, scale=self.scale)
        o = o.transpose(1, 2).flatten(0, 1)
        return o if group.even else o.index_select(0, group.standing)


def beside(x: Tensor, group: Group) -> Tensor:
    """Tokens [tokens, heads, width] as rows beside one another [rows, heads, length, width]."""
    rows, length = group.tokens.shape
    if group.even:
        own = x[group.begin : group.begin + rows * length]
    else:  # what stands for padding counts for nothing, whatever it is
        own = x.index_select(0, group.tokens.clamp(min=group.begin).flatten())
    return own.view(rows, length, *x.shape[1:]).transpose(1, 2)
