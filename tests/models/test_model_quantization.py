"""4-bit and 8-bit bases train on the CPU, and keep their weights whatever mode they run in."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peftctl.errors import ModelError
from peftctl.models.base import Model, load
from peftctl.models.quantization import _blocked, bitsandbytes, config

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
CPU = torch.device("cpu")


@pytest.fixture(params=[128, 48], ids=["even", "odd"])
def base(request: pytest.FixtureRequest, tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Path:
    """A Llama as wide as bitsandbytes' inference layout wants it, and one that it does not fit."""
    torch.manual_seed(0)
    shape = {"hidden_size": request.param, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def recipe(path: Path, quantization: str, dtype: str = "float32") -> Model:
    return Model(name_or_path=str(path), quantization=quantization, dtype=dtype, device="cpu")  # type: ignore[arg-type]


def run(model: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their square at the input."""
    given = embeddings.detach().requires_grad_()
    logits = model(inputs_embeds=given).logits
    logits.float().square().sum().backward()
    return logits.detach(), given.grad  # type: ignore[return-value]


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.cosine_similarity(one.flatten().float(), other.flatten().float(), 0).item()


def weights(model: Any) -> list[Tensor]:
    dequantize = bitsandbytes().functional.dequantize_4bit
    hosts = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(hosts) == 14
    return [dequantize(host.weight.data, host.weight.quant_state).float() for host in hosts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_trains_on_the_cpu(quantization: str, dtype: str, base: Path) -> None:
    said: list[str] = []
    model = load(recipe(base, quantization, dtype), say=said.append).model
    assert said[1] == f"weights in {quantization}"
    misread = quantization != "int8" and model.config.hidden_size == 48 and AVX512
    assert [line[:30] for line in said[2:]] == (["warning: 4-bit layers 48 wide,"] if misread else [])
    whole = load(recipe(base, quantization, dtype), quantize=False).model
    assert not any("bit" in type(module).__name__ for module in whole.modules())
    assert type(model.lm_head) is torch.nn.Linear
    embeddings = whole.get_input_embeddings()(torch.arange(4, 24)[None])
    logits, gradient = run(model.train(), embeddings)
    right, slope = run(whole, embeddings)
    assert cosine(logits, right) > (0.95 if quantization != "int8" else 0.999)
    assert cosine(gradient, slope) > (0.9 if quantization != "int8" else 0.999)
    # evaluation between two steps changes nothing
    with torch.no_grad():
        seen = model.eval()(inputs_embeds=embeddings).logits
    assert cosine(seen, logits) > 0.999
    again, slope_again = run(model.train(), embeddings)
    assert torch.equal(again, logits)
    assert torch.equal(slope_again, gradient)
    # nor does the mode matter to who asks for gradients
    assert cosine(run(model.eval(), embeddings)[1], gradient) > 0.999


def test_weights_stay_as_quantised(base: Path) -> None:
    model = load(recipe(base, "nf4")).model
    before = weights(model)
    with torch.no_grad():
        model(torch.arange(4, 24)[None])
        model.generate(torch.arange(4, 8)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.state_dict()
    assert all(torch.equal(one, other) for one, other in zip(before, weights(model), strict=True))
    right = [p for n, p in load(recipe(base, "none")).model.named_parameters() if "_proj" in n]
    misread = model.config.hidden_size == 48 and AVX512
    assert all(cosine(one, other) > (0.96 if misread else 0.99) for one, other in zip(before, right, strict=True))


def test_configuration() -> None:
    nf4 = config("nf4", double=True, dtype=torch.bfloat16, device=CPU)
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert nf4.bnb_4bit_compute_dtype is torch.bfloat16
    assert config("fp4", double=False, dtype=torch.float32, device=CPU).bnb_4bit_use_double_quant is False
    assert config("int8", double=True, dtype=torch.float32, device=CPU).load_in_8bit is True


def test_apple_gpus_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model.quantization: `nf4` does not work on Apple GPUs"):
        config("nf4", double=True, dtype=torch.float32, device=torch.device("mps"))


def test_a_broken_bitsandbytes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"model.quantization: bitsandbytes does not load: ModuleNotFoundError"):
        bitsandbytes()


KERNELS = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def get_kernel(*args, **kwargs):
    Path(__file__).with_name("asked").touch()
    raise OSError("no network")
"""

IMPORT = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
from peftctl.models.quantization import bitsandbytes
assert bitsandbytes().__name__ == "bitsandbytes"
assert bitsandbytes() is bitsandbytes()
assert "kernels" not in sys.modules
"""


def test_import_neither_warns_nor_fetches(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORT}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "asked").exists()


def test_a_package_already_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    package, part = ModuleType("kernels"), ModuleType("kernels.part")
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setitem(sys.modules, "kernels.part", part)
    with _blocked("kernels"):
        for name in ("kernels", "kernels.part"):
            with pytest.raises(ImportError):
                importlib.import_module(name)
    assert (sys.modules["kernels"], sys.modules["kernels.part"]) == (package, part)


def test_no_noise_while_it_runs(
    base: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load(recipe(base, "int8", "bfloat16")).model
    with torch.no_grad():
        model(torch.arange(4, 24)[None])
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
