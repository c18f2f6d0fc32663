"""Batched generation: prompts side by side, answers without what follows their stop token."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from peftctl.data.batches import collate
from peftctl.data.fitting import Encoded
from peftctl.data.formats import Example
from peftctl.data.reading import RowEncoder
from peftctl.engine.inputs import evaluating
from peftctl.errors import RunError
from peftctl.models.positions import room

Describe = Callable[..., list[str]]
"""What the encoder of a task whose rows are more than tokens generates answers by."""


def stop_ids(model: nn.Module, encoder: RowEncoder) -> list[int]:
    """Every token that ends an answer: the model's own, the tokenizer's, and those that were trained."""
    own = getattr(model, "generation_config", None) and model.generation_config.eos_token_id  # type: ignore[union-attr]
    own = own if isinstance(own, list) else [own]
    return sorted({*own, encoder.tokenizer.eos_token_id, *encoder.stop_ids} - {None})


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: Sequence[Sequence[int]], encoder: RowEncoder, max_new_tokens: int, **sampling: Any
) -> list[str]:
    """What `model` answers to each prompt, greedily unless `sampling` says otherwise; special tokens left out.

    Answers end where the model has no position for another token. Raises RunError for a prompt that leaves it none.
    """
    tokenizer, network = encoder.tokenizer, cast(Any, model)
    device = next(model.parameters()).device
    both = network.config.is_encoder_decoder  # its answers stand apart from what it reads
    inputs = padded(prompts, tokenizer.pad_token_id, "right" if both else "left")
    if (limit := room(model)) is not None:
        longest = max(map(len, prompts))
        if longest > limit - (not both):
            beside = "" if both else ", its answer included"
            text = f"a prompt of {longest:,} tokens, and {type(model).__name__} reads {limit:,}{beside}"
            raise RunError(text, "shorten it")
        max_new_tokens = min(max_new_tokens, limit - 1 if both else limit - longest)
    with evaluating(model):
        out = network.generate(
            **getattr(encoder, "opening", {}),
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids(model, encoder),
            pad_token_id=tokenizer.pad_token_id,
            **({"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None} | sampling),
        )
    said = out if both else out[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def padded(prompts: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [prompts, length]; an answer goes on behind its prompt where padding is left."""
    rows = [Encoded(array("i", prompt), ()) for prompt in prompts]
    return {name: tensor for name, tensor in collate(rows, pad_id, side).items() if name != "labels"}


def generate(
    model: nn.Module,
    rows: Sequence[Example],
    encoder: RowEncoder,
    max_new_tokens: int,
    batch_size: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
    **sampling: Any,
) -> list[str]:
    """The answer of `model` to each row, in the order of `rows`: greedy, unless `sampling` says otherwise."""
    describe: Describe | None = getattr(encoder, "describe", None)
    prompts = [encoder.prompt(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if describe:
            texts = describe(model, [rows[i] for i in batch], max_new_tokens, **sampling)
        else:
            texts = continuations(model, [prompts[i] for i in batch], encoder, max_new_tokens, **sampling)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
        tick(start + len(batch), len(order))
    return answers
