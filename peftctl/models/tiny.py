"""A model of the same architecture as another one, small enough to train in seconds, with a tokenizer of bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.models.quiet import quiet
from peftctl.models.tiny_seeing import halves, joined, write_processor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

HEADS = 4
POSITIONS = 2048
"""Longest row: a byte is a token here, so rows are long."""

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "num_decoder_layers", "encoder_layers", "decoder_layers")
_INNER = ("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MARKS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>")
_SPECIAL = ("<pad>", "<s>", "</s>", *_MARKS, "<|eot_id|>", "<|begin_of_text|>")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, the special tokens of well-known chat templates, and ChatML as its own template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos = vocabulary["<s>"]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def shrink(config: PreTrainedConfig, vocabulary: int, *, layers: int = 2, width: int = 128) -> PreTrainedConfig:
    """The configuration of a tiny model of the same class.

    Query, key and value heads stand in the same relation (all alike, groups, or one), layers of several kinds all
    occur, and what is tied, scaled, normed or rotated stays so.

    Args:
        vocabulary: size of the tokenizer.
        layers: fewest layers.
        width: hidden size, a multiple of 64, which 4-bit weights need.
    """
    raw = config.to_dict()
    names = config.attribute_map

    def get(name: str) -> Any:
        return raw.get(names.get(name, name))

    def put(name: str, value: Any) -> None:
        key = names.get(name, name)
        if key in raw:
            raw[key] = value

    hidden, heads = get("hidden_size"), get("num_attention_heads")
    kinds = list(dict.fromkeys(raw.get("layer_types") or ()))
    count = max(layers, 2 * len(kinds))
    for name in _LAYERS:
        put(name, count)
    if kinds:  # every kind occurs, in turn
        raw["layer_types"] = [kinds[index % len(kinds)] for index in range(count)]
    for name in ("mlp_layer_types", "no_rope_layers", "attention_layers", "mlp_only_layers"):
        if isinstance(raw.get(name), list):
            raw[name] = raw[name][:count] if name != "mlp_only_layers" else []
    for name in ("sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"):
        put(name, 2)
    put("max_window_layers", 0 if (get("max_window_layers") or 0) == 0 else count)

    for name in ("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads"):
        put(name, HEADS)
    for name in ("num_key_value_heads", "num_kv_heads"):
        before = get(name)
        if isinstance(before, int) and isinstance(heads, int):
            put(name, HEADS if before == heads else min(before, HEADS // 2))
    head = width // HEADS
    explicit = get("head_dim") or raw.get("d_kv")
    if isinstance(explicit, int) and isinstance(hidden, int) and explicit * heads != hidden:
        head = 2 * head  # attention is wider than the model, or was narrower: in both cases not as wide
    for name in ("head_dim", "d_kv"):
        if isinstance(raw.get(name), int):
            raw[name] = head
    put("query_pre_attn_scalar", head)
    put("rotary_dim", min(raw.get("rotary_dim") or head, head))
    rope = raw.get("rope_parameters")
    if isinstance(rope, dict):
        raw["rope_parameters"] = _rope(rope)
    projected = raw.get("word_embed_proj_dim")
    put("word_embed_proj_dim", width if projected == hidden else width // 2)

    put("hidden_size", width)
    for name in _INNER:
        if isinstance(get(name), int):
            put(name, 2 * width)
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        put(name, width)
    for name in _EXPERTS:
        if isinstance(get(name), int) and get(name) > 1:
            put(name, 4)
    put("num_experts_per_tok", 2)
    put("sliding_window", 64 if get("sliding_window") else get("sliding_window"))
    for name in _POSITIONS:
        if isinstance(get(name), int) and get(name) > 0:
            put(name, POSITIONS + 2)  # RoBERTa starts counting at two
    for key in list(raw):
        if key.endswith("_token_id"):
            raw[key] = None
    ids = {token: number for number, token in enumerate(_SPECIAL)}
    raw.update(pad_token_id=ids["<pad>"], bos_token_id=ids["<s>"], eos_token_id=ids["</s>"])
    if "decoder_start_token_id" in raw:
        raw["decoder_start_token_id"] = ids["<pad>"]
    put("vocab_size", 64 * math.ceil(vocabulary / 64))
    raw.pop("transformers_version", None)
    small: PreTrainedConfig = type(config).from_dict(raw)
    return small


def write(config: PreTrainedConfig, folder: Path, *, seed: int = 0, layers: int = 2, width: int = 128) -> Path:
    """A tiny random model like the one that `config` describes, with its tokenizer, as a folder of transformers."""
    import torch
    import transformers

    words = tokenizer()
    sizes: dict[str, Any] = {"vocabulary": len(words), "layers": layers, "width": width}
    if inside := halves(config):
        top = None if inside[-1] in ("text_config", "decoder") else shrink(config, **sizes)
        small: Any = joined(config, {name: shrink(getattr(config, name), **sizes) for name in inside}, top)
        write_processor(folder)
    else:
        small = shrink(config, **sizes)
    named = [name for name in config.architectures or () if hasattr(transformers, name)]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        if named:
            model = getattr(transformers, named[0])(small)
        else:
            model = transformers.AutoModelForCausalLM.from_config(small)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings without factors that hold for one size of head only; by kind of layer or for all of them."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {key: _rope(value) if isinstance(value, dict) else value for key, value in rope.items()}
    if rope.get("rope_type") != "longrope":
        return rope
    keep = ("rope_theta", "partial_rotary_factor")
    return {"rope_type": "default", **{key: rope[key] for key in keep if key in rope}}
