"""How many tokens a model has positions for, tried on the model itself: one more fails, or reads beyond its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from peftctl.engine.attach import attach
from peftctl.methods import METHODS
from peftctl.models.positions import positions, room

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig(**SMALL, intermediate_size=16, vocab_size=96, max_position_embeddings=20)),
    "roberta": lambda: RobertaModel(
        RobertaConfig(**SMALL, intermediate_size=16, vocab_size=96, max_position_embeddings=22, pad_token_id=1)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2, n_positions=20)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, vocab_size=96, max_position_embeddings=20)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=96,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=20,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_so_many_can_be_read_and_one_more_cannot(name: str):
    model = MODELS[name]().eval()
    most = positions(model)
    assert most == 20
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_others_have_no_such_limit(name: str):
    assert positions(tiny.build(name, 0)) is None
    assert room(tiny.build(name, 0)) is None


def test_virtual_tokens_take_room():
    model = MODELS["bert"]().eval()
    assert room(model) == 20
    attach(model, METHODS["prompt"](num_virtual_tokens=8))
    assert room(model) == 12
    model(input_ids=torch.full((1, 12), 5), attention_mask=torch.ones(1, 12))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 13), 5), attention_mask=torch.ones(1, 13))
