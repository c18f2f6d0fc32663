"""What models are asked in the proof of a merge: texts, and pictures where they look at some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftctl.models.head import PICTURES, SEQ2SEQ, Head
from peftctl.tasks.seq2seq import shifted

Batch = dict[str, Tensor]

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asks why.",
    "Übermorgen fährt Jürgen mit der U-Bahn nach Köln; das Öl ist teuer.",
    "La niña pidió café con leche; ¿cuánto cuesta? Son 12,50 €.",
    "Сегодня вечером мы пойдём в театр, если не будет дождя.",
    "人工智能正在改变世界。東京は今日も雨です。",
    "السلام عليكم، كيف حالك اليوم؟ नमस्ते दुनिया",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # circle\n",
    '1, 1, 2, 3, 5, 8, 13, 21, 34: what comes next? {"answer": 55}',
)
"""What the models are asked, beside the caller's own texts."""

LENGTH = 16
"""Tokens in a row of probes."""

ROWS = 24
"""Most rows: the logits of one model for all of them are kept, 230 MB where there are 150,000 tokens."""

LOOKS = 4
"""Most rows of a model that looks at pictures, a picture each."""


def probes(tokenizer: Any, vocabulary: int, texts: Sequence[str] = ()) -> Tensor:
    """Token ids [rows, LENGTH] of the caller's `texts` and of ours, and a row from all over the vocabulary.

    Rows are cut from the texts in a row, without padding. The caller's come first, and take two thirds at most.
    """
    spread = [(number * vocabulary // LENGTH + number) % vocabulary for number in range(LENGTH)]
    own = rows(tokenizer, TEXTS)
    asked = rows(tokenizer, texts)[: ROWS * 2 // 3]
    return torch.tensor([*asked, *own[: ROWS - 1 - len(asked)], spread])


def rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of `texts`, one after the other, cut into rows; the last one begins again with the first tokens."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids += ids[: -len(ids) % LENGTH] if len(ids) >= LENGTH else ids * LENGTH
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]


def batch_of(model: Any, head: Head, ids: Tensor) -> Batch:
    """What `model` takes, made of the rows `ids` [rows, LENGTH]; pictures are noise of the size that it takes."""
    if head == PICTURES:
        return looking(model, ids[:LOOKS])
    if head.classifies and model.config.is_encoder_decoder:
        ids = ended(ids, model.config)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"decoder_input_ids": shifted(ids.roll(1, 0), model)} if head == SEQ2SEQ else batch


def ended(ids: Tensor, config: Any) -> Tensor:
    """The rows with one end token each, at the end: where a decoder behind an encoder classifies."""
    end = config.eos_token_id
    ids = ids.masked_fill(ids == end, end + 1)
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, :1], end)], dim=1)


@torch.no_grad()
def looking(model: Any, ids: Tensor) -> Batch:
    """A picture beside each of the rows; where pictures stand among the tokens, in front of the row."""
    vision = getattr(model.config, "vision_config", model.config)
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.Generator().manual_seed(0)
    pictures = torch.rand(len(ids), getattr(vision, "num_channels", 3), height, width, generator=noise)
    mark = getattr(model.config, "image_token_id", None)
    if mark is not None:
        seen = model.get_image_features(pixel_values=pictures, return_dict=True).pooler_output
        marks = torch.full((len(ids), sum(map(len, seen)) // len(ids)), mark)
        ids = torch.cat([marks, ids.masked_fill(ids == mark, mark - 1)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures}
