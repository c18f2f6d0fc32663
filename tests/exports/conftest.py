"""Tiny models on disk with a tokenizer and a chat template, adapters of them, and merging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import peftctl

TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}"
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(chr(code) for code in range(32, 32 + tiny.VOCAB - 4))]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny.llama,
    "llama tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,
}


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """Writes a base model; `dtype` and `max_shard_size` as `save_pretrained` has them."""

    def make(name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path / f"base-{seed}"
        model = BASES[name]()
        for parameter in model.parameters():  # biases start as zeros, which nothing can be relative to
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(folder, **options)
        tokenizer().save_pretrained(folder)
        return folder

    return make


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as plain transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA of the base in a folder, with random values; `fields` are those of the method."""

    def make(base: Path, *, seed: int = 7, **fields: Any) -> Path:
        model = peftctl.attach(open_model(base), peftctl.METHODS["lora"](**{"r": 4, "alpha": 8, **fields}))
        tiny.stir(model, seed)
        return peftctl.save(model, tmp_path / f"adapter-{seed}")

    return make
