"""Batched generation: prompts padded on the left, answers without what follows their stop token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat, Message, Pair, Parsed
from peftctl.engine.inputs import evaluating


def prompt(row: Parsed, encoder: Encoder) -> list[int]:
    """The ids that a row's answer follows."""
    if isinstance(row, Chat):
        return chat_prompt(row.messages[:-1], encoder, row.place, row.tools)
    return text_prompt(row.prompt if isinstance(row, Pair) else row.text, encoder)


def chat_prompt(
    messages: Sequence[Message], encoder: Encoder, place: str = "messages", tools: Sequence[Any] | None = None
) -> list[int]:
    """A conversation up to where the assistant answers, as ids."""
    return encoder.chat_prompt(messages, tools, place)


def text_prompt(text: str, encoder: Encoder) -> list[int]:
    """Plain text to go on from, as ids; an end token that the tokenizer appends would end it, so it goes."""
    return encoder.text_prompt(text)


def stop_ids(model: nn.Module, encoder: Encoder) -> list[int]:
    """Every token that ends an answer: the model's own, the tokenizer's, and those that were trained."""
    own = getattr(model, "generation_config", None) and model.generation_config.eos_token_id  # type: ignore[union-attr]
    own = own if isinstance(own, list) else [own]
    return sorted({*own, encoder.tokenizer.eos_token_id, *encoder.stop_ids} - {None})


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: Sequence[Sequence[int]], encoder: Encoder, max_new_tokens: int, **sampling: Any
) -> list[str]:
    """What `model` answers to each prompt, greedily unless `sampling` says otherwise; special tokens left out."""
    tokenizer, width = encoder.tokenizer, max(map(len, prompts))
    device = next(model.parameters()).device
    ids = [[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    with evaluating(model):
        out = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids(model, encoder),
            pad_token_id=tokenizer.pad_token_id,
            **({"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None} | sampling),
        )
    return [str(text) for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def generate(
    model: nn.Module,
    rows: Sequence[Parsed],
    encoder: Encoder,
    max_new_tokens: int,
    batch_size: int,
    tick: Callable[[int, int], None],
) -> list[str]:
    """The greedy answer of `model` to each row, in the order of `rows`."""
    prompts = [prompt(row, encoder) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = continuations(model, [prompts[i] for i in batch], encoder, max_new_tokens)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
        tick(start + len(batch), len(order))
    return answers
