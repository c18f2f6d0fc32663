"""What needs a CUDA card: run where there is one, skipped elsewhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import peftctl
from peftctl import attach
from peftctl.data.batches import Layout
from peftctl.engine.attach import trained
from peftctl.errors import Interrupted
from peftctl.fast import faster
from peftctl.methods.lora import LoRA
from peftctl.models.recomputing import recompute
from peftctl.tasks.sft import SFT
from peftctl.training.offload import Offload
from tests.fast.test_exact import LENGTHS, assert_near, rows
from tests.tiny import VOCAB, stir
from tests.tiny_chat import chats, recipe, write_base, write_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")

CARD = torch.device("cuda")
WIDE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def made(name: str, method: Any, dtype: torch.dtype, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(**WIDE | more)
    model = getattr(tf, f"{name}ForCausalLM")(config).to(CARD, dtype).train()
    attach(model, method)
    stir(model)
    return model  # type: ignore[no-any-return]


def batch(layout: Any, repeat: int = 1, shared: int = 20) -> dict[str, torch.Tensor]:
    every = rows(shared) * repeat
    one = Layout(every, len(every), 0, layout)
    (part,) = one.micro_batches(range(len(every)))
    return one.batch(part, CARD)


def computed(model: nn.Module, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss = SFT().sums(model, given)["loss"]
    named = trained(model)
    return {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}


def loud(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize("layout", [None, "lines", "flat"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 9}),
        ("Qwen3", {}),
        ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("Phi3", {}),
    ],
)
def test_the_fast_path_is_exact_in_float32(name: str, more: Any, layout: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model, given = made(name, LoRA(r=8), torch.float32, **more), batch(layout)
    expected = computed(model, given)
    with faster(model, loud) as fast:
        assert fast
        assert_near(computed(model, given), expected, 1e-4)


@pytest.mark.parametrize("layout", [None, "flat"])
def test_a_common_beginning_is_computed_once(layout: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model, given = made("Llama", LoRA(r=8), torch.float32), batch(layout, shared=40)
    expected = computed(model, given)
    seen: list[int] = []
    with faster(model, loud) as fast:
        assert fast
        fast.model.norm.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
        assert_near(computed(model, given), expected, 1e-4)
    assert seen == [sum(LENGTHS) + 40]


def test_in_bfloat16_it_is_as_near_the_truth() -> None:
    model, given = made("Llama", LoRA(r=8), torch.float32), batch(None)
    truth = computed(model, given)
    model.to(torch.bfloat16)
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    there = computed(model, given)
    with faster(model, loud):
        here = computed(model, given)

    def error(one: dict[str, torch.Tensor]) -> float:
        return sum(float((one[key].float() - truth[key]).norm()) for key in truth if key != "loss")

    assert error(here) <= 1.2 * error(there)


def test_checkpointing_draws_the_same_dropout_and_offloading_changes_nothing() -> None:
    model, given = made("Llama", LoRA(r=8, dropout=0.3), torch.bfloat16), batch(None, repeat=64)
    recompute(model)
    with faster(model, loud):
        peaks, found = [], []
        for context in (torch.enable_grad(), Offload()):
            torch.manual_seed(3)
            torch.cuda.reset_peak_memory_stats()
            loss = None
            with context:
                loss = SFT().sums(model, given)["loss"]
            held = torch.cuda.memory_allocated()
            gradients = torch.autograd.grad(loss, list(trained(model).values()))
            found.append(dict(zip(trained(model), gradients, strict=True)) | {"loss": loss.detach()})
            peaks.append(held)
            del loss, gradients
    for key, one in found[0].items():
        assert torch.equal(one, found[1][key]), key
    assert peaks[1] < peaks[0] - (2 << 20)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_resumes_with_the_same_bits(quantization: str, tmp_path: Path) -> None:
    base, lines = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", chats(24))
    written = recipe(base, lines)
    written["model"] |= {"device": "cuda", "dtype": "bfloat16", "quantization": quantization}

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    peftctl.train(written, output=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftctl.train(written, output=tmp_path / "parts", listen=stop)
    peftctl.train(written, output=tmp_path / "parts", resume=True)
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_plan_is_what_is_measured(quantization: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i} " + "a word more " * 200} for i in range(16)])
    written = {
        "model": {"name_or_path": "Qwen/Qwen2.5-0.5B", "load_format": "dummy", "dtype": "bfloat16", "device": "cuda"},
        "method": {"type": "lora", "r": 16, "target_modules": "all-linear"},
        "dataset": {"train": str(rows), "max_length": 1024, "on_long": "truncate"},
        "trainer": {"task": "text", "steps": 3, "batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": True},
        "output": "run",
    }
    written["model"]["quantization"] = quantization
    done = peftctl.train(written, output=tmp_path / "run")
    assert 0.95 * done["peak_memory"] <= done["predicted_memory"] <= 1.1 * done["peak_memory"]
