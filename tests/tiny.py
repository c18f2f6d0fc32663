"""Tiny random models of the real classes, and the inputs to feed them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 96


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, **ids))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MixtralForCausalLM(config)


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return ViTForImageClassification(config)


ZOO: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert}
"""The shapes that everything is tried on."""
MORE: dict[str, Callable[[], nn.Module]] = {"mixtral": mixtral, "vit": vit}
"""Experts fused into 3-D parameters; pictures instead of tokens."""


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of the zoo in evaluation mode, its weights a function of `seed`."""
    torch.manual_seed(seed)
    return (ZOO | MORE)[name]().eval()


def inputs(model: nn.Module, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Token ids without padding, and decoder ids where the model wants them."""
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :5]
    return batch


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**inputs(model)).logits


@torch.no_grad()
def greedy(model: nn.Module, tokens: int = 6) -> list[list[int]]:
    """What the model continues with, most probable token by most probable token."""
    given = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
    return model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=0).tolist()


def stir(model: nn.Module, seed: int = 7) -> None:
    """Give everything trainable random values, so that an adapter differs from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
