"""Every recipe of a method from end to end on a tiny model: train, resume, evaluate, generate, merge or say why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chat
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl import bundled
from peftctl import recipe as recipes
from peftctl.errors import NotMergeable
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.export import export
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge
from peftctl.verbs.mortal import one_thread

NAMES = [name for name in bundled.names() if name.startswith("methods/")]
GPT2 = ("methods/bitfit",)
"""Recipes of models with biases."""
SIZES = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama and a GPT-2 whose widths 4-bit blocks divide."""
    torch.manual_seed(0)
    llama = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **SIZES)
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, **SIZES)
    folder = tmp_path_factory.mktemp("bases")
    for name, model in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2))):
        tiny.stir(model)
        model.save_pretrained(folder / name)
        tiny_chat.tokenizer().save_pretrained(folder / name)
    return {"llama": folder / "llama", "gpt2": folder / "gpt2"}


@pytest.fixture(scope="module")
def small(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., recipes.Recipe]:
    """Reads a recipe with everything made small but its method."""
    folder = tmp_path_factory.mktemp("data")
    train = tiny_chat.write_rows(folder / "train.jsonl", tiny_chat.chats(11))
    held_out = tiny_chat.write_rows(folder / "held-out.jsonl", tiny_chat.chats(5, start=40))

    def read(name: str, *more: str) -> recipes.Recipe:
        base = bases["gpt2" if name in GPT2 else "llama"]
        words = [f"model.name_or_path={base}", "model.dtype=float32", "model.device=cpu", f"dataset.train={train}"]
        words += [f"dataset.eval={held_out}", "dataset.max_length=512", "dataset.chat_template=tokenizer"]
        words += ["trainer.steps=4", "trainer.save_every=2", "trainer.batch_size=4", "trainer.micro_batch_size=3"]
        words += [f"eval.labels=[{','.join(tiny_chat.LABELS)}]", "eval.max_rows=5"]
        return recipes.read(name, [*words, *more])

    return read


def made(small: Callable[..., recipes.Recipe], name: str) -> recipes.Recipe:
    """The recipe `name`, made small; fusion first trains what it fuses."""
    if name != "methods/fusion":
        return small(name)
    for run in ("one", "two"):
        peftctl.train(small("methods/bottleneck", f"seed={len(run)}"), output=run)
    return small(name, "method.adapters=[one/adapter,two/adapter]")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_from_end_to_end(name: str, small: Callable[..., recipes.Recipe], bases: dict[str, Path]):
    recipe = made(small, name)
    result = peftctl.train(recipe, output="run")
    assert result["steps"] == 4
    adapter, last = Path("run/adapter"), Path("run/checkpoints/step-000004")
    whole = files(adapter)
    shutil.rmtree(adapter)
    shutil.rmtree(last)
    peftctl.train(recipe, output="run", resume=True)
    assert files(adapter) == whole

    figures: dict[str, Any] = evaluate("run")["figures"]
    assert figures["adapter"]["loss"] != figures["base"]["loss"]
    assert generate("run", "is it a?") == generate("run", "is it a?")

    export("run", format="peft", output="exported")
    base = bases["gpt2" if name in GPT2 else "llama"]
    if recipe.model.quantization == "none":
        from_run, from_export = (peftctl.load(tiny_chat.plain(base), folder) for folder in (adapter, "exported"))
        assert torch.equal(tiny.logits(from_run), tiny.logits(from_export))
        assert not torch.equal(tiny.logits(from_run), tiny.logits(tiny_chat.plain(base)))
    if recipe.method.merges.startswith("into"):
        merge("run", "merged")
        if recipe.model.quantization == "none":
            merged = tiny.logits(tiny_chat.plain(Path("merged")))
            torch.testing.assert_close(merged, tiny.logits(from_run), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(NotMergeable):
            merge("run", "merged")
        assert not Path("merged").exists()
