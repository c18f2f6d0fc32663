"""Packed rows are computed as each alone, on every architecture that says so; those that cannot are found out."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_chat
import torch
import transformers
from methods.settings import SETTINGS, made
from tiny import VOCAB, build, stir

import peftctl
from peftctl.data.batches import Layout
from peftctl.data.encode import Encoded
from peftctl.engine.attach import trained
from peftctl.models.base import Model, load
from peftctl.models.recomputing import recompute
from peftctl.tasks.packable import logits, obstacle
from peftctl.tasks.sft import SFT
from peftctl.verbs.mortal import one_thread

IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
USUAL = IDS | DEPTH | {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = USUAL | {"num_key_value_heads": 2}
SLIDING = GROUPED | {"sliding_window": 4}
OPENAI = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

PACKED: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": SLIDING,
    "Mixtral": GROUPED | {"num_local_experts": 4},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Gemma2": SLIDING | {"head_dim": 8},
    "Gemma3": SLIDING | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi": GROUPED,
    "Phi3": GROUPED,
    "GPT2": OPENAI,
    "GPTNeoX": USUAL,
    "GPTJ": OPENAI | {"rotary_dim": 4},
    "Cohere": GROUPED,
    "StableLm": GROUPED,
    "SmolLM3": GROUPED | {"num_hidden_layers": 4},
}
"""What the class is called, and a tiny configuration: windows shorter than a row, layers without positions."""

PADDED: dict[str, dict[str, Any]] = {
    "OPT": IDS | DEPTH | {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "Bloom": IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": IDS | DEPTH | {"hidden_size": 32},
    "Mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "Mamba": IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
CLASSES = {"Gemma3": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
LENGTHS = (11, 4, 9, 2, 7, 12)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def network(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**(PACKED | PADDED)[name] | changes)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config).eval()
    stir(model)
    return model


def rows() -> list[Encoded]:
    draw = torch.Generator().manual_seed(3)
    ids = (torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in LENGTHS)
    return [Encoded(array("i", one), ((1, len(one)),)) for one in ids]


def attached(model: Any) -> Any:
    peftctl.attach(model, peftctl.METHODS["lora"](r=4))
    stir(model)
    return model


def gradients(model: Any, packing: Any, compiled: Any = None) -> dict[str, torch.Tensor]:
    """Of the summed loss of all rows, in one micro-batch."""
    layout = Layout(rows(), len(LENGTHS), 0, packing)
    [part] = layout.micro_batches(range(len(LENGTHS)))
    model.zero_grad()
    SFT().loss(model if compiled is None else compiled, layout.batch(part, torch.device("cpu"))).backward()
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}


@pytest.mark.parametrize("packing", ["lines", "flat"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_are_computed_as_each_alone(name: str, packing: Any):
    model = attached(network(name))
    assert obstacle(model, packing) is None
    with torch.no_grad():
        packed = logits(model, rows(), [[5], [0, 1], [2, 3], [4]], packing)
        for index, found in zip([5, 0, 1, 2, 3, 4], packed, strict=True):
            alone = model(input_ids=torch.tensor([rows()[index].input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    padded, found = gradients(model, None), gradients(model, packing)
    assert found.keys() == padded.keys()
    for key, gradient in padded.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_mixes_packed_rows_is_found_out(name: str):
    found = obstacle(attached(network(name)), "lines")
    assert found is not None
    assert "lets a token see the row before it" in found


def test_a_model_that_ignores_where_rows_begin_for_positions_alone_is_found_out(monkeypatch: pytest.MonkeyPatch):
    model = network("GPT2")
    forward = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda ids: forward(torch.arange(ids.shape[-1])[None]))
    assert obstacle(model, "lines") == "GPT2LMHeadModel computes a packed row differently from the row alone"


def test_a_forward_that_fails_is_an_obstacle(monkeypatch: pytest.MonkeyPatch):
    model = network("GPT2")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask, use_cache: forward(input_ids))
    assert "does not take packed rows" in obstacle(model, "lines")
    assert "position_ids" in obstacle(model, "lines")


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_methods_that_act_on_whole_lines_are_refused_and_all_others_pack(method: str):
    if "llama" not in SETTINGS[method].zoo:
        pytest.skip("not for language models")
    model = peftctl.attach(build("llama"), made(method, "llama"))
    stir(model)
    found = obstacle(model, "lines")
    if method in ("prompt", "p_tuning", "prefix", "reft"):
        assert found == f"`{method}` acts on whole lines, not on the rows in them"
    else:
        assert found is None


def test_trying_leaves_no_trace():
    model = attached(network("Llama")).train()
    state, modes = torch.get_rng_state(), {key: module.training for key, module in model.named_modules()}
    assert obstacle(model, "lines") is None
    assert torch.equal(torch.get_rng_state(), state)
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled_and_recomputed_models_pack():
    model = attached(network("Llama", num_hidden_layers=1)).train()
    expected = gradients(model, None)
    compiled = torch.compile(model, backend="aot_eager")
    for key, gradient in gradients(model, "lines", compiled).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)
    recompute(model)
    for key, gradient in gradients(model, "lines").items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_models_pack(tmp_path: Any, quantization: Any, dtype: Any):
    config = GROUPED | {"hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    stir(model)
    model.save_pretrained(tmp_path)
    tiny_chat.tokenizer().save_pretrained(tmp_path)
    block = Model(name_or_path=str(tmp_path), device="cpu", dtype=dtype, quantization=quantization)
    loaded = attached(load(block).model)
    assert obstacle(loaded, "lines") is None
