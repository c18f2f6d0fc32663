"""The shapes of well-known models, so that they can be sized and imitated without a network.

Numbers are those of the `config.json` files on the hub: whatever decides how large a model is. What says only how it
computes, such as the scaling of rotary embeddings, is left at transformers' defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Shape = dict[str, Any]
"""A transformers configuration as its `config.json` has it, with `model_type` and `architectures`."""

_DECODER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_GPT2 = ("n_embd", "n_layer", "n_head")
_OPT = ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "word_embed_proj_dim")
_BLOOM = ("hidden_size", "n_layer", "n_head")
_T5 = ("d_model", "d_ff", "num_layers", "num_heads")
_ENCODER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

_LLAMA: Shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_LLAMA2 = {**_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {**_LLAMA, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}
_MISTRAL: Shape = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
_QWEN2: Shape = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
_QWEN3: Shape = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960},
    **{"head_dim": 128, "vocab_size": 151936},
}
_GEMMA: Shape = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
_GEMMA1 = {**_GEMMA, "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": 256000}
_GEMMA2 = {**_GEMMA, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000}
_GEMMA3 = {**_GEMMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 256}
_PHI3: Shape = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
_T5_SHAPE: Shape = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128}
_FLAN = {**_T5_SHAPE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 64}
_MT5 = {
    **{"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"], "vocab_size": 250112},
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 64},
}
_BERT: Shape = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "max_position_embeddings": 512}
_ROBERTA: Shape = {
    **{"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "max_position_embeddings": 514},
    **{"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}

_FAMILIES: list[tuple[Shape, tuple[str, ...], dict[str, tuple[int, ...]]]] = [
    (
        _LLAMA2,
        _DECODER,
        {
            "meta-llama/Llama-2-7b-hf meta-llama/Llama-2-7b-chat-hf": (4096, 11008, 32, 32, 32),
            "meta-llama/Llama-2-13b-hf meta-llama/Llama-2-13b-chat-hf": (5120, 13824, 40, 40, 40),
            "meta-llama/Llama-2-70b-hf meta-llama/Llama-2-70b-chat-hf": (8192, 28672, 80, 64, 8),
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (2048, 5632, 22, 32, 4),
        },
    ),
    (
        _LLAMA3,
        _DECODER,
        {
            "meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-8B-Instruct meta-llama/Llama-3.1-8B "
            "meta-llama/Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8),
            "meta-llama/Meta-Llama-3-70B meta-llama/Meta-Llama-3-70B-Instruct meta-llama/Llama-3.1-70B "
            "meta-llama/Llama-3.1-70B-Instruct meta-llama/Llama-3.3-70B-Instruct": (8192, 28672, 80, 64, 8),
            "meta-llama/Llama-3.1-405B meta-llama/Llama-3.1-405B-Instruct": (16384, 53248, 126, 128, 8),
        },
    ),
    (
        {**_LLAMA3, "tie_word_embeddings": True},
        _DECODER,
        {
            "meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, 8),
            "meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, 8),
        },
    ),
    (
        {**_LLAMA, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
        _DECODER,
        {
            "HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-135M-Instruct HuggingFaceTB/SmolLM-135M "
            "HuggingFaceTB/SmolLM-135M-Instruct": (576, 1536, 30, 9, 3),
            "HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-360M-Instruct HuggingFaceTB/SmolLM-360M "
            "HuggingFaceTB/SmolLM-360M-Instruct": (960, 2560, 32, 15, 5),
            "HuggingFaceTB/SmolLM2-1.7B HuggingFaceTB/SmolLM2-1.7B-Instruct HuggingFaceTB/SmolLM-1.7B "
            "HuggingFaceTB/SmolLM-1.7B-Instruct": (2048, 8192, 24, 32, 32),
        },
    ),
    (
        {
            **{"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256},
            **{"max_position_embeddings": 65536, "tie_word_embeddings": True},
        },
        _DECODER,
        {"HuggingFaceTB/SmolLM3-3B HuggingFaceTB/SmolLM3-3B-Base": (2048, 11008, 36, 16, 4)},
    ),
    (
        {**_MISTRAL, "vocab_size": 32000, "sliding_window": 4096},
        _DECODER,
        {"mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1": (4096, 14336, 32, 32, 8)},
    ),
    (
        {**_MISTRAL, "vocab_size": 32000, "sliding_window": None},
        _DECODER,
        {"mistralai/Mistral-7B-Instruct-v0.2": (4096, 14336, 32, 32, 8)},
    ),
    (
        {**_MISTRAL, "vocab_size": 32768, "sliding_window": None},
        _DECODER,
        {"mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3": (4096, 14336, 32, 32, 8)},
    ),
    (
        {
            **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000},
            **{"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768},
        },
        _DECODER,
        {"mistralai/Mixtral-8x7B-v0.1 mistralai/Mixtral-8x7B-Instruct-v0.1": (4096, 14336, 32, 32, 8)},
    ),
    (
        {**_QWEN2, "vocab_size": 151936, "tie_word_embeddings": True},
        _DECODER,
        {
            "Qwen/Qwen2-0.5B Qwen/Qwen2-0.5B-Instruct Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct": (
                *(896, 4864, 24, 14, 2),
            ),
            "Qwen/Qwen2-1.5B Qwen/Qwen2-1.5B-Instruct Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-1.5B-Instruct": (
                *(1536, 8960, 28, 12, 2),
            ),
            "Qwen/Qwen2.5-3B Qwen/Qwen2.5-3B-Instruct": (2048, 11008, 36, 16, 2),
        },
    ),
    (
        {**_QWEN2, "vocab_size": 152064},
        _DECODER,
        {
            "Qwen/Qwen2-7B Qwen/Qwen2-7B-Instruct Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct "
            "Qwen/Qwen2.5-Coder-7B Qwen/Qwen2.5-Coder-7B-Instruct": (3584, 18944, 28, 28, 4),
            "Qwen/Qwen2.5-14B Qwen/Qwen2.5-14B-Instruct": (5120, 13824, 48, 40, 8),
            "Qwen/Qwen2.5-32B Qwen/Qwen2.5-32B-Instruct": (5120, 27648, 64, 40, 8),
            "Qwen/Qwen2.5-72B Qwen/Qwen2.5-72B-Instruct": (8192, 29568, 80, 64, 8),
        },
    ),
    (
        {**_QWEN3, "tie_word_embeddings": True},
        _DECODER,
        {
            "Qwen/Qwen3-0.6B Qwen/Qwen3-0.6B-Base": (1024, 3072, 28, 16, 8),
            "Qwen/Qwen3-1.7B Qwen/Qwen3-1.7B-Base": (2048, 6144, 28, 16, 8),
            "Qwen/Qwen3-4B Qwen/Qwen3-4B-Base": (2560, 9728, 36, 32, 8),
        },
    ),
    (
        _QWEN3,
        _DECODER,
        {
            "Qwen/Qwen3-8B Qwen/Qwen3-8B-Base": (4096, 12288, 36, 32, 8),
            "Qwen/Qwen3-14B Qwen/Qwen3-14B-Base": (5120, 17408, 40, 40, 8),
            "Qwen/Qwen3-32B": (5120, 25600, 64, 64, 8),
        },
    ),
    (
        {**_GEMMA1, "head_dim": 256},
        _DECODER,
        {
            "google/gemma-2b google/gemma-2b-it": (2048, 16384, 18, 8, 1),
            "google/gemma-7b google/gemma-7b-it": (3072, 24576, 28, 16, 16),
        },
    ),
    (
        {**_GEMMA2, "head_dim": 256},
        _DECODER,
        {
            "google/gemma-2-2b google/gemma-2-2b-it": (2304, 9216, 26, 8, 4),
            "google/gemma-2-9b google/gemma-2-9b-it": (3584, 14336, 42, 16, 8),
        },
    ),
    (
        {**_GEMMA2, "head_dim": 128, "query_pre_attn_scalar": 144},
        _DECODER,
        {"google/gemma-2-27b google/gemma-2-27b-it": (4608, 36864, 46, 32, 16)},
    ),
    (
        {**_GEMMA3, "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512},
        _DECODER,
        {
            "google/gemma-3-270m google/gemma-3-270m-it": (640, 2048, 18, 4, 1),
            "google/gemma-3-1b-pt google/gemma-3-1b-it": (1152, 6912, 26, 4, 1),
        },
    ),
    (
        {"model_type": "phi", "architectures": ["PhiForCausalLM"], "vocab_size": 51200, "partial_rotary_factor": 0.4},
        _DECODER,
        {"microsoft/phi-2": (2560, 10240, 32, 32, 32)},
    ),
    (
        {**_PHI3, "vocab_size": 32064},
        _DECODER,
        {
            "microsoft/Phi-3-mini-4k-instruct microsoft/Phi-3-mini-128k-instruct microsoft/Phi-3.5-mini-instruct": (
                *(3072, 8192, 32, 32, 32),
            ),
            "microsoft/Phi-3-medium-4k-instruct": (5120, 17920, 40, 40, 10),
        },
    ),
    (
        {**_PHI3, "vocab_size": 100352, "max_position_embeddings": 16384},
        _DECODER,
        {"microsoft/phi-4": (5120, 17920, 40, 40, 10)},
    ),
    (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        _GPT2,
        {
            "gpt2 openai-community/gpt2": (768, 12, 12),
            "gpt2-medium openai-community/gpt2-medium": (1024, 24, 16),
            "gpt2-large openai-community/gpt2-large": (1280, 36, 20),
            "gpt2-xl openai-community/gpt2-xl": (1600, 48, 25),
            "distilgpt2 distilbert/distilgpt2": (768, 6, 12),
        },
    ),
    (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"]},
        _OPT,
        {
            "facebook/opt-125m": (768, 3072, 12, 12, 768),
            "facebook/opt-1.3b": (2048, 8192, 24, 32, 2048),
            "facebook/opt-2.7b": (2560, 10240, 32, 32, 2560),
            "facebook/opt-6.7b": (4096, 16384, 32, 32, 4096),
        },
    ),
    (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "do_layer_norm_before": False},
        _OPT,
        {"facebook/opt-350m": (1024, 4096, 24, 16, 512)},
    ),
    (
        {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 250880},
        _BLOOM,
        {
            "bigscience/bloom-560m bigscience/bloomz-560m": (1024, 24, 16),
            "bigscience/bloom-1b1 bigscience/bloomz-1b1": (1536, 24, 16),
            "bigscience/bloom-1b7 bigscience/bloomz-1b7": (2048, 24, 16),
            "bigscience/bloom-3b bigscience/bloomz-3b": (2560, 30, 32),
            "bigscience/bloom-7b1 bigscience/bloomz-7b1": (4096, 30, 32),
            "bigscience/bloom bigscience/bloomz": (14336, 70, 112),
        },
    ),
    (
        {**_T5_SHAPE, "d_kv": 64},
        _T5,
        {
            "t5-small google-t5/t5-small": (512, 2048, 6, 8),
            "t5-base google-t5/t5-base": (768, 3072, 12, 12),
            "t5-large google-t5/t5-large": (1024, 4096, 24, 16),
        },
    ),
    (
        _FLAN,
        _T5,
        {
            "google/flan-t5-small": (512, 1024, 8, 6),
            "google/flan-t5-base": (768, 2048, 12, 12),
            "google/flan-t5-large": (1024, 2816, 24, 16),
            "google/flan-t5-xl": (2048, 5120, 24, 32),
            "google/flan-t5-xxl": (4096, 10240, 24, 64),
        },
    ),
    (
        _MT5,
        _T5,
        {
            "google/mt5-small bigscience/mt0-small": (512, 1024, 8, 6),
            "google/mt5-base bigscience/mt0-base": (768, 2048, 12, 12),
            "google/mt5-large bigscience/mt0-large": (1024, 2816, 24, 16),
        },
    ),
    (
        _BERT,
        _ENCODER,
        {
            "bert-base-uncased google-bert/bert-base-uncased": (768, 3072, 12, 12, 30522),
            "bert-base-cased google-bert/bert-base-cased": (768, 3072, 12, 12, 28996),
            "bert-large-uncased google-bert/bert-large-uncased": (1024, 4096, 24, 16, 30522),
            "bert-large-cased google-bert/bert-large-cased": (1024, 4096, 24, 16, 28996),
            "bert-base-multilingual-cased google-bert/bert-base-multilingual-cased": (768, 3072, 12, 12, 119547),
        },
    ),
    (
        {**_BERT, "architectures": ["BertModel"]},
        _ENCODER,
        {"sentence-transformers/all-MiniLM-L6-v2": (384, 1536, 6, 12, 30522)},
    ),
    (
        _ROBERTA,
        _ENCODER,
        {
            "roberta-base FacebookAI/roberta-base": (768, 3072, 12, 12, 50265),
            "roberta-large FacebookAI/roberta-large": (1024, 4096, 24, 16, 50265),
        },
    ),
]
"""What the models of a family share, the keys in which they differ, and by their ids, the values of these."""


def _entries() -> Iterator[tuple[str, Shape]]:
    for shared, keys, sizes in _FAMILIES:
        for ids, values in sizes.items():
            for one in ids.split():
                yield one, {**shared, **dict(zip(keys, values, strict=True))}


KNOWN: dict[str, Shape] = dict(_entries())
"""By hub id."""


def parameters(shape: Shape) -> int:
    """How many parameters a model of this shape has; nothing of its size is built.

    What is tied counts once. The head that fills masked words in is not counted: nothing here uses it.
    """
    import transformers

    [name] = shape["architectures"]
    config = transformers.AutoConfig.for_model(**shape)
    with torch.device("meta"):
        if name.endswith("ForMaskedLM"):
            count: int = transformers.AutoModel.from_config(config).num_parameters()
        else:
            count = getattr(transformers, name)(config).num_parameters()
    # transformers makes every T5 tied, and finds the output head of those that are not in their files alone
    untied = "d_model" in shape and shape.get("tie_word_embeddings") is False
    head: int = config.vocab_size * config.d_model if untied else 0
    return count + head
