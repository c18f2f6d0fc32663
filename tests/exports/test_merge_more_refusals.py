"""What `peftctl merge` refuses, and that nothing which looks finished is left of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.errors import AdapterError, Interrupted, ModelError, PeftctlError, StorageError
from peftctl.methods.lora import LowRank
from peftctl.verbs.merge import merge

Make = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(make_base: Make) -> Path:
    return make_base("llama")


@pytest.fixture
def adapter(base: Path, make_adapter: Make) -> Path:
    return make_adapter(base, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to merge to, in a folder of its own, so that leftovers beside it are seen."""
    parent = tmp_path / "into"
    parent.mkdir()
    return parent / "merged"


def assert_nothing(out: Path) -> None:
    assert list(out.parent.iterdir()) == []


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def test_the_same_adapter_twice(base: Path, adapter: Path, make_adapter: Make, out: Path) -> None:
    merge(str(adapter), out)
    with pytest.raises(AdapterError, match="merged into it already"):
        merge(str(adapter), out.with_name("again"), base=str(out))
    assert sorted(out.parent.iterdir()) == [out]
    other = make_adapter(base, seed=8, target_modules=["q_proj"])
    merge(str(other), out.with_name("both"), base=str(out))
    assert sorted(path.name for path in out.parent.iterdir()) == ["both", "merged"]


def test_an_adapter_two_merges_back(base: Path, adapter: Path, make_adapter: Make, out: Path) -> None:
    merge(str(adapter), out)
    merge(str(make_adapter(base, seed=8, target_modules=["q_proj"])), out.with_name("both"), base=str(out))
    with pytest.raises(AdapterError, match="merged into it already"):
        merge(str(adapter), out.with_name("again"), base=str(out.with_name("both")))
    assert not out.with_name("again").exists()


def test_an_adapter_of_a_wider_base(adapter: Path, base: Path, tmp_path: Path, out: Path) -> None:
    wide = tmp_path / "wide"
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=96, **heads)
    LlamaForCausalLM(config).save_pretrained(wide)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (wide / name).write_bytes((base / name).read_bytes())
    with pytest.raises(AdapterError, match=r"has shape .*, the model wants"):
        merge(str(adapter), out, base=str(wide))
    assert_nothing(out)


def test_an_adapter_of_another_architecture(adapter: Path, make_base: Make, out: Path) -> None:
    with pytest.raises(AdapterError):
        merge(str(adapter), out, base=str(make_base("gpt2", seed=1)))
    assert_nothing(out)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
TAMPERED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "nan": (lambda t: t[Q].fill_(float("nan")), "not finite"),
    "infinite": (lambda t: t[Q].view(-1)[:1].fill_(float("inf")), "not finite"),
    "missing": (lambda t: t.pop(Q), "missing"),
    "foreign": (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}), "not part of this adapter"),
    "mis-shaped": (lambda t: t.update({Q: t[Q][:-1].clone()}), "has shape"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_adapter(how: str, adapter: Path, out: Path) -> None:
    change, said = TAMPERED[how]
    rewrite(adapter / WEIGHTS, change)
    with pytest.raises(AdapterError, match=said) as error:
        merge(str(adapter), out)
    assert any("q_proj" in text or "norm" in text for text, _ in error.value.problems)
    assert_nothing(out)


def test_a_truncated_adapter(adapter: Path, out: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError):
        merge(str(adapter), out)
    assert_nothing(out)


def test_a_truncated_base(adapter: Path, base: Path, out: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError):
        merge(str(adapter), out)
    assert_nothing(out)


def test_a_base_that_is_not_finite(adapter: Path, base: Path, out: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(base / "model.safetensors", lambda t: t[name].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(PeftctlError, match="finite"):
        merge(str(adapter), out)
    assert_nothing(out)


def test_a_base_that_is_quantised_on_disk(adapter: Path, base: Path, out: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised"):
        merge(str(adapter), out)
    assert_nothing(out)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_already(kind: str, adapter: Path, out: Path) -> None:
    kept = out / "mine.txt" if kind == "folder" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        merge(str(adapter), out)
    assert kept.read_text() == "mine"
    assert sorted(out.parent.iterdir()) == [out]


def test_dequantised_wants_a_quantised_run(adapter: Path, out: Path) -> None:
    with pytest.raises(PeftctlError, match="dequantised"):
        merge(str(adapter), out, into="dequantised")
    assert_nothing(out)


class Stopped(Exception):
    pass


def test_an_exception_on_the_way(adapter: Path, out: Path) -> None:
    heard: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        heard.append(event)
        if any(out.parent.iterdir()):  # something is being written
            raise Stopped

    with pytest.raises(Stopped):
        merge(str(adapter), out, listen=listen)
    assert_nothing(out)


def test_a_signal_on_the_way(adapter: Path, out: Path) -> None:
    sent: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if not sent and any(out.parent.iterdir()):
            assert callable(signal.getsignal(signal.SIGTERM))  # else it would end the tests
            sent.append(event)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as error:
        merge(str(adapter), out, listen=listen)
    assert sent
    assert error.value.exit_code == 130
    assert_nothing(out)
    merge(str(adapter), out)
    assert (out / "model.safetensors").is_file()


right = LowRank.merged


def scaled(adapter: LowRank, value: Tensor, name: str = "weight") -> Tensor:
    """Forgets the scale: alpha / r is 2 here."""
    return value + (right(adapter, value, name) - value) / 2


def one_off(adapter: LowRank, value: Tensor, name: str = "weight") -> Tensor:
    """One number of each weight is wrong, by 0.05 where weights are about 0.03."""
    new = right(adapter, value, name).clone()
    if not new.is_meta:
        new.view(-1)[7] += 0.05
    return new


def untouched(adapter: LowRank, value: Tensor, name: str = "weight") -> Tensor:
    """The base itself."""
    return value.clone()


@pytest.mark.parametrize("wrong", [scaled, one_off, untouched])
def test_a_wrong_merge_does_not_pass_the_proof(
    wrong: Callable[..., Tensor], adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRank, "merged", wrong)
    with pytest.raises(PeftctlError, match="differ"):
        merge(str(adapter), out)
    assert_nothing(out)


def test_the_proof_is_in_the_report(adapter: Path, base: Path, out: Path) -> None:
    returned = merge(str(adapter), out)
    written = json.loads((out / "merge_report.json").read_text())
    assert written == {key: value for key, value in returned.items() if key != "path"}
    assert written["proof"]
    assert peftctl.load(LlamaForCausalLM.from_pretrained(base), adapter) is not None
    assert str(base.parent) not in (out / "config.json").read_text()
