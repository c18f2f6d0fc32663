"""The table of known models has their true sizes, and every one of them can be made tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from peftctl.models import tiny
from peftctl.models.known import known, parameters

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-270m": 268_098_176,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "facebook/bart-base": 139_420_416,
    "facebook/bart-large-cnn": 406_290_432,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-1b1": 1_065_314_304,
    "bigscience/bloom-1b7": 1_722_408_960,
    "bigscience/bloom-3b": 3_002_557_440,
    "bigscience/bloom-7b1": 7_069_016_064,
    "bigscience/bloom": 176_247_271_424,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "google/flan-t5-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
    "google/flan-t5-xl": 2_849_757_184,
    "google/mt5-small": 300_176_768,
    "bert-base-uncased": 109_482_240,
    "bert-base-cased": 108_310_272,
    "bert-large-uncased": 335_141_888,
    "bert-base-multilingual-cased": 177_853_440,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_model_has_the_published_number_of_parameters(name: str):
    assert parameters(known()[name]) == PUBLISHED[name]


def kinds() -> list[str]:
    """One model of every type, and those whose embeddings are projected."""
    found = {(shape["model_type"], "opt-350m" in name): name for name, shape in reversed(known().items())}
    return sorted(found.values())


@pytest.mark.parametrize("name", kinds())
def test_a_tiny_model_is_of_the_same_class(name: str, tmp_path: Path):
    config = AutoConfig.for_model(**known()[name])
    folder = tiny.write(config, tmp_path)
    small, words = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (small.model_type, small.architectures) == (config.model_type, config.architectures)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * 2**20
    model = getattr(transformers, small.architectures[0]).from_pretrained(folder)
    inputs = words("naïve 漢", return_tensors="pt")
    decoder = {"decoder_input_ids": inputs["input_ids"]} if small.is_encoder_decoder else {}
    pixels = {"pixel_values": torch.zeros(1, 3, 32, 32)} if hasattr(small, "vision_config") else {}
    output = model(**{key: value for key, value in inputs.items() if key != "token_type_ids"}, **decoder, **pixels)
    assert output[0].isfinite().all()
    assert words.decode(inputs["input_ids"][0], skip_special_tokens=True) == "naïve 漢"


def test_heads_keep_their_relation_and_kinds_of_layers_occur():
    def small(name: str) -> transformers.PreTrainedConfig:
        return tiny.shrink(AutoConfig.for_model(**known()[name]), 300)

    def groups(name: str) -> tuple[int, int]:
        return small(name).num_attention_heads, small(name).num_key_value_heads

    assert groups("meta-llama/Llama-2-7b-hf") == (4, 4)
    assert groups("meta-llama/Llama-2-70b-hf") == (4, 2)
    assert groups("google/gemma-2b") == (4, 1)
    assert set(small("google/gemma-3-1b-it").layer_types) == {"sliding_attention", "full_attention"}
    assert small("mistralai/Mixtral-8x7B-v0.1").num_local_experts == 4


def test_equal_seeds_make_equal_models(tmp_path: Path):
    config = AutoConfig.for_model(**known()["gpt2"])
    one, two, other = (tiny.write(config, tmp_path / f"{n}", seed=seed) for n, seed in enumerate((1, 1, 2)))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]
