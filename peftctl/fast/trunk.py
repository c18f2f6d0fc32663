"""The layers of a decoder of Llama's kind, run block by block over the tokens that are no padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftctl.engine.adapter import Stack
from peftctl.fast.block import AttentionBlock, Block, GatedBlock, Step
from peftctl.fast.plain import Plain
from peftctl.fast.recomputed import recomputed
from peftctl.fast.remembered import Remembered
from peftctl.fast.rows import Rows, arranged


@dataclass(frozen=True)
class Trunk:
    """Stands for the forward of a model without its head, `own`, where that is called as training calls it."""

    model: Any
    """Has `embed_tokens`, `rotary_emb` and `norm`."""
    own: Callable[..., Any]
    layers: Sequence[tuple[AttentionBlock, GatedBlock]]
    kernels: Plain
    remembered: Remembered
    """What came out of the layers below `trained`."""

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        unusual = past_key_values is not None or use_cache or any(kwargs.values()) or self.by_row()
        read = input_ids if inputs_embeds is None else inputs_embeds
        rows = None
        if not unusual and read is not None:
            shape = read.shape[:2]
            rows = arranged(input_ids, attention_mask, position_ids, shape, share=not self.random())
        if rows is None or read is None:
            return self.own(**given, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        kept = None if input_ids is None else self.recalled(input_ids, rows)
        if kept is not None:
            x = kept
        else:
            chosen = read.flatten(0, 1)[rows.source]
            x = self.model.embed_tokens(chosen) if inputs_embeds is None else chosen
        x = self.through(x, rows, self.trained if kept is not None else 0, len(self.layers))
        hidden = self.model.norm(x)[rows.target].view(*shape, -1)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def through(self, x: Tensor, rows: Rows, first: int, last: int) -> Tensor:
        """Hidden states [tokens, width] after the layers from `first` up to `last`."""
        cos, sin = self.model.rotary_emb(x, rows.positions)
        step = Step(rows, (cos[0].contiguous(), sin[0].contiguous()), self.kernels)
        recompute = bool(getattr(self.model, "gradient_checkpointing", False)) and self.model.training
        for layer in self.layers[first:last]:
            if recompute:
                parameters = [p for block in layer for p in block.parameters]
                x = recomputed(partial(halves, layer=layer, step=step), x, parameters)
            else:
                x = halves(x, layer, step)
        return x

    @property
    def trained(self) -> int:
        """The first layer with adapters; 0 where something before the layers is trained."""
        if any(p.requires_grad for p in self.model.embed_tokens.parameters()):
            return 0
        adapted = (any("adapters" in host._modules for block in layer for host in block.hosts) for layer in self.layers)
        return next((i for i, one in enumerate(adapted) if one), 0)

    def room(self, tokens: int) -> bool:
        """Whether what comes out of the lower layers can be kept for so many tokens."""
        return self.remembered.room(tokens)

    @torch.no_grad()
    def remember(self, ids: Tensor, mask: Tensor) -> None:
        """Keep what the lower layers make of the rows of a batch, `ids` and `mask` [rows, width]."""
        rows = arranged(ids, mask, None, ids.shape, share=False)
        if rows is None:
            return
        x = self.through(self.model.embed_tokens(ids.flatten()[rows.source]), rows, 0, self.trained)
        for a, b in rows.spans:
            self.remembered.keep(ids.flatten()[a:b], x[rows.target[a:b]])

    def recalled(self, ids: Tensor, rows: Rows) -> Tensor | None:
        """What was kept of the tokens that are computed; None where a row is missing."""
        if not self.remembered.places:
            return None
        flat = ids.flatten()
        found = [self.remembered.find(flat[a:b]) for a, b in rows.spans]
        if any(one is None for one in found):
            return None
        whole = torch.empty(len(flat), self.remembered.width, dtype=self.remembered.dtype, device=ids.device)
        for (a, b), one in zip(rows.spans, found, strict=True):
            whole[a:b] = cast(Tensor, one)
        return whole[rows.source]

    def by_row(self) -> bool:
        """Whether the rows of a batch have adapters of their own."""
        stacks = (host._modules.get("adapters") for layer in self.layers for block in layer for host in block.hosts)
        return any(isinstance(stack, Stack) and stack.rows is not None for stack in stacks)

    def random(self) -> bool:
        """Whether equal tokens are computed differently, by dropout."""
        return self.model.training and any(isinstance(m, nn.Dropout) and m.p for m in self.model.modules())


def halves(x: Tensor, layer: tuple[AttentionBlock, GatedBlock], step: Step) -> Tensor:
    """One layer."""
    for block in layer:
        x = cast(Block, block)(x.contiguous(), step)
    return x
