"""`peftctl merge` and `peftctl export` of an adapter folder: what plain transformers then loads, and what travels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftctl
from peftctl.verbs.export import export
from peftctl.verbs.merge import merge

Make = Callable[..., Path]
ATTENTION = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}

# base, fields of the adapter, whether embedding and head are two afterwards though they were one
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {"target_modules": ATTENTION["llama"]}, False),
    "tied": ("llama tied", {"target_modules": "all-linear"}, False),
    "rslora": ("llama", {"target_modules": ATTENTION["llama"], "use_rslora": True}, False),
    "conv1d": ("gpt2", {"target_modules": ATTENTION["gpt2"]}, False),
    "conv1d, bias all": ("gpt2", {"target_modules": ATTENTION["gpt2"], "bias": "all"}, False),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "tied, head whole": ("llama tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    "tied, head low rank": ("llama tied", {"target_modules": ["q_proj", "lm_head"]}, True),
    "tied, embedding": ("llama tied", {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "tied, both": ("llama tied", {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, True),
    "gpt2, embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}, True),
}


def plain(folder: Path) -> Any:
    """The model as plain transformers loads it, nothing left over and nothing made up."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def adapted(base: Path, adapter: Path) -> Any:
    return peftctl.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def assert_same(merged: Path, base: Path, adapter: Path) -> None:
    one, other = plain(merged), adapted(base, adapter)
    torch.testing.assert_close(tiny.logits(one), tiny.logits(other), rtol=0, atol=1e-5)
    assert tiny.greedy(one) == tiny.greedy(other)
    assert not torch.allclose(tiny.logits(one), tiny.logits(plain(base)), atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_merged_says_what_the_adapter_says(case: str, make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    name, fields, untied = CASES[case]
    base = make_base(name)
    adapter = make_adapter(base, **fields)
    merge(str(adapter), tmp_path / "out")
    assert_same(tmp_path / "out", base, adapter)
    was_tied = bool(plain(base).config.tie_word_embeddings)
    assert config(tmp_path / "out").get("tie_word_embeddings", was_tied) is (was_tied and not untied)
    # what no adapter stands on keeps every bit
    model = adapted(base, adapter)
    hosts = {site for site, module in model.named_modules() if "adapters" in module._modules}
    before, after = tensors(base), tensors(tmp_path / "out")
    touched = {key for key in after if key.rpartition(".")[0] in hosts}
    assert touched
    assert after.keys() - before.keys() <= {"lm_head.weight"}
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - touched)
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("case", ["llama", "conv1d", "rslora", "head", "tied"])
def test_peft_merges_to_the_same_weights(case: str, make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    name, fields, _ = CASES[case]
    base = make_base(name)
    adapter = make_adapter(base, **fields)
    merge(str(adapter), tmp_path / "out")
    ours = dict(plain(tmp_path / "out").named_parameters())
    theirs = dict(peft.PeftModel.from_pretrained(plain(base), adapter).merge_and_unload().named_parameters())
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)


def test_names_without_the_prefix(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("gpt2")
    adapter = make_adapter(base, target_modules=["c_attn"], bias="all")
    short = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    assert "h.0.attn.c_attn.weight" in short
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    merge(str(adapter), tmp_path / "out")
    assert_same(tmp_path / "out", base, adapter)


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_shards_are_read_and_written(name: str, make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base(name, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    adapter = make_adapter(base, target_modules="all-linear", modules_to_save=["lm_head"])
    merge(str(adapter), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert_same(tmp_path / "out", base, adapter)


def test_half_precision_stays_and_rounds_once(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, target_modules=ATTENTION["llama"])
    merge(str(adapter), tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    exact = dict(peft.PeftModel.from_pretrained(plain(base), adapter).merge_and_unload().named_parameters())
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if any(f"{name}.weight" in key for name in ATTENTION["llama"])}
    for key in after:
        if key in changed:  # within half a step of bfloat16, and a hair for the order of sums
            torch.testing.assert_close(after[key].float(), exact[key], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(
        tiny.logits(plain(tmp_path / "out")), tiny.logits(adapted(base, adapter)), rtol=0, atol=0.05
    )


def test_everything_else_travels(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama")
    (base / "LICENSE").write_text("as you like")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.7, "do_sample": True}))
    adapter = make_adapter(base, target_modules=["q_proj"])
    merge(str(adapter), tmp_path / "one")
    one = AutoTokenizer.from_pretrained(tmp_path / "one")
    asked = [{"role": "user", "content": "hi"}]
    base_tokenizer = AutoTokenizer.from_pretrained(base)
    assert one.apply_chat_template(asked) == base_tokenizer.apply_chat_template(asked)
    assert one.get_vocab() == base_tokenizer.get_vocab()
    assert plain(tmp_path / "one").generation_config.temperature == 0.7
    assert (tmp_path / "one" / "LICENSE").read_text() == "as you like"
    # the template that the adapter was trained with goes before the base's
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}<eos>{{ m['content'] }}{% endfor %}")
    merge(str(adapter), tmp_path / "two")
    two = AutoTokenizer.from_pretrained(tmp_path / "two").apply_chat_template(asked, tokenize=False)
    assert two == "<eos>hi"


def test_export_gives_the_same_two(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama tied")
    adapter = make_adapter(base, target_modules="all-linear")
    export(str(adapter), tmp_path / "merged", format="safetensors")
    assert_same(tmp_path / "merged", base, adapter)
    export(str(adapter), tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(plain(base), tmp_path / "peft").eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(adapted(base, adapter)), rtol=0, atol=1e-6)
