"""Causal attention by torch's own kernels: flash attention (Dao 2023, arXiv:2307.08691) where card and dtype have it.

    o = softmax(q k^T / sqrt(width)) v,    heads of queries share those of keys

Rows of similar length stand beside one another. Their padding stands behind them, where the causal mask hides it. What
all rows begin with stands before the keys of each: the first query of a row sees all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention.bias import causal_lower_right

from peftctl.fast.attention import Attention, Turn
from peftctl.fast.plain import hidden
from peftctl.fast.rows import Group, Rows


@dataclass(frozen=True)
class Flash(Attention):
    """The same as `Attention`."""

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
        queries, keys, values = beside(q, group), *(behind(one, group) for one in (k, v))
        heads, length = queries.shape[1], queries.shape[2]
        last = group.after + length
        options: dict[str, Any] = {"scale": self.scale, "enable_gqa": keys.shape[1] != heads}
        if 0 < self.window < last:  # a mask and shared keys at once are beyond the fast kernels
            keys, values = (one.repeat_interleave(heads // one.shape[1], dim=1) for one in (keys, values))
            mask = hidden(queries.new_empty(1, length, last), length, group.after, self.window)
            options |= {"attn_mask": mask, "enable_gqa": False}
        else:
            options |= {"attn_mask": causal_lower_right(length, last)} if group.after else {"is_causal": True}
        o = F.scaled_dot_product_attention(queries, keys, values, **options)
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


def behind(x: Tensor, group: Group) -> Tensor:
    """`beside`, behind the common beginning [rows, heads, beginning + length, width]."""
    own = beside(x, group)
    if not group.after:
        return own
    first = x[: group.after].transpose(0, 1).expand(len(own), -1, -1, -1)
    return torch.cat([first, own], dim=2)
