"""Tiny bases of every kind of model, and what to feed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as hf
from torch import Tensor, nn

from peftctl.models.head import PICTURES, SEQ2SEQ, SEQUENCES, TOKENS, Head

LABELS = ("bad", "good", "so so", "none")
VOCAB = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 130, **LAYERS, **VOCAB}
DECODER = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, **LAYERS, **VOCAB}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, **VOCAB, "decoder_start_token_id": 0}
BART = {
    **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in (("layers", 2), ("ffn_dim", 128))},
    **{"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
    **{**VOCAB, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}
MODERN = {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
VISION = {
    "initializer_range": 0.02,
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    **LAYERS,
}


def apart() -> nn.Module:
    """T5 as of version 1.1: another output head than the embedding."""
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    model.lm_head.weight = nn.Parameter(0.1 * torch.randn_like(model.lm_head.weight))
    return model


def blip() -> nn.Module:
    text = {**ENCODER, "encoder_hidden_size": 64, "sep_token_id": 2}
    return hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config=VISION))


def llava() -> nn.Module:
    parts = {"text_config": hf.LlamaConfig(**DECODER), "vision_config": hf.CLIPVisionConfig(**VISION)}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts, image_token_index=95, image_seq_length=4))


def qwen() -> nn.Module:
    """Takes pictures cut into pieces by its own processor."""
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    text = {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision))


BASES: dict[str, tuple[Head, Callable[[], nn.Module]]] = {
    "t5": (SEQ2SEQ, lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "t5 1.1": (SEQ2SEQ, apart),
    "mt5": (SEQ2SEQ, lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5))),
    "bart": (SEQ2SEQ, lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART))),
    "bert": (SEQUENCES, lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER))),
    "bert inside": (SEQUENCES, lambda: hf.BertModel(hf.BertConfig(**ENCODER))),
    "roberta": (SEQUENCES, lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER))),
    "distilbert": (SEQUENCES, lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**ENCODER))),
    "modernbert": (SEQUENCES, lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**ENCODER, **MODERN))),
    "llama": (SEQUENCES, lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))),
    "gpt2": (
        SEQUENCES,
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**{**VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4})),
    ),
    "bart that classifies": (SEQUENCES, lambda: hf.BartModel(hf.BartConfig(**BART))),
    "t5 that classifies": (SEQUENCES, lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "bert, tokens": (TOKENS, lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER))),
    "llama, tokens": (TOKENS, lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True))),
    "blip": (PICTURES, blip),
    "git": (PICTURES, lambda: hf.GitForCausalLM(hf.GitConfig(vision_config=VISION, **ENCODER))),
    "llava": (PICTURES, llava),
}


def plain(folder: Path, head: Head, **options: Any) -> Any:
    """The model as plain transformers loads it."""
    return getattr(hf, head.auto).from_pretrained(folder, dtype=torch.float32, **head.options(), **options)


def inputs(model: Any, head: Head) -> dict[str, Tensor]:
    """Three rows, of which one is padded where that is usual, with what else the model takes."""
    ids = torch.randint(4, tiny.VOCAB - 2, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    if head == PICTURES:
        if hasattr(model.config, "image_token_id"):
            ids = torch.cat([torch.full((3, 4), 95), ids], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    ids[:, -1] = 2
    if model.config.is_encoder_decoder and head.classifies:
        return {"input_ids": ids, "attention_mask": mask}
    ids[1, 4:], mask[1, 4:] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask}
    return given | {"decoder_input_ids": ids[:, :4]} if head == SEQ2SEQ else given


@torch.no_grad()
def logits(model: Any, head: Head) -> Tensor:
    """What the model in evaluation mode makes of `inputs`; padding left out."""
    given = inputs(model, head)
    found: Tensor = model.eval()(**given).logits
    return found[given["attention_mask"].bool()] if head == TOKENS else found
