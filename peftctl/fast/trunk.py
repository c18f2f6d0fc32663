"""The layers of a decoder of Llama's kind, run block by block over the tokens that are no padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftctl.engine.adapter import Stack
from peftctl.fast.block import AttentionBlock, Block, GatedBlock, Step
from peftctl.fast.plain import Plain
from peftctl.fast.rows import arranged


@dataclass(frozen=True)
class Trunk:
    """Stands for the forward of a model without its head, `own`, where that is called as training calls it."""

    model: Any
    """Has `embed_tokens`, `rotary_emb` and `norm`."""
    own: Callable[..., Any]
    layers: Sequence[tuple[AttentionBlock, GatedBlock]]
    kernels: Plain

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
        chosen = read.flatten(0, 1)[rows.source]
        x: Tensor = self.model.embed_tokens(chosen) if inputs_embeds is None else chosen
        cos, sin = self.model.rotary_emb(x, rows.positions)
        recompute = bool(getattr(self.model, "gradient_checkpointing", False)) and self.model.training
        step = Step(rows, (cos[0].contiguous(), sin[0].contiguous()), self.kernels, recompute)
        for layer in self.layers:
            for block in layer:
                x = cast(Block, block)(x.contiguous(), step)
        hidden = self.model.norm(x)[rows.target].view(*shape, -1)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def by_row(self) -> bool:
        """Whether the rows of a batch have adapters of their own."""
        stacks = (host._modules.get("adapters") for layer in self.layers for block in layer for host in block.hosts)
        return any(isinstance(stack, Stack) and stack.rows is not None for stack in stacks)

    def random(self) -> bool:
        """Whether equal tokens are computed differently, by dropout."""
        return self.model.training and any(isinstance(m, nn.Dropout) and m.p for m in self.model.modules())


def same(one: Tensor, other: Tensor, allowed: float) -> bool:
    """Whether two tensors differ by rounding alone: by `allowed`, relative to the largest number."""
    return bool(torch.isfinite(one).all()) and float((one - other).abs().max()) <= allowed * float(other.abs().max())
