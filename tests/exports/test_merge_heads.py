"""Every kind of model: its adapter in HF PEFT, and its merged folder in plain transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_heads as zoo
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_chat import tokenizer

import peftctl
from peftctl.engine import hosts
from peftctl.engine.anatomy import modules
from peftctl.errors import AdapterError, NotMergeable, RunError
from peftctl.exports.card import HERE, Facts, card
from peftctl.exports.dequantise import Quantised, linears
from peftctl.exports.merge import merge
from peftctl.exports.skeleton import skeleton
from peftctl.models.adapted import head_of
from peftctl.models.base import Model, load
from peftctl.models.head import PICTURES, SEQUENCES, Head
from peftctl.models.origin import ORIGIN, origin_bytes
from peftctl.verbs.export import export
from peftctl.verbs.merge import merge as merge_verb

Write = Callable[..., tuple[Path, Path, Head]]


def base_of(model: torch.nn.Module, folder: Path) -> Path:
    """A folder with the model and a tokenizer."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a base of the zoo and an adapter of it, its new head trained whole; gives both folders and the head."""

    def make(name: str, kind: str = "lora", **fields: Any) -> tuple[Path, Path, Head]:
        head, build = zoo.BASES[name]
        torch.manual_seed(0)
        base = base_of(build(), tmp_path / "base")
        return base, attached(base, head, tmp_path / "adapter", kind, **fields), head

    return make


def attached(base: Path, head: Head, folder: Path, kind: str = "lora", **fields: Any) -> Path:
    """An adapter with random values, saved as a run saves it."""
    labels = zoo.LABELS if head.classifies else ()
    found = load(Model(name_or_path=str(base), dtype="float32", device="cpu"), head.with_labels(labels))
    if found.new and kind != "full":
        fields["modules_to_save"] = list(found.new)
    if kind in ("lora", "dora"):
        fields = {"r": 4, "alpha": 8, "target_modules": "all-linear", **fields}
    peftctl.attach(found.model, peftctl.METHODS[kind](**fields))
    tiny.stir(found.model)
    peftctl.save(found.model, folder)
    (folder / ORIGIN).write_bytes(origin_bytes(base, "base", labels))
    return folder


def whole(folder: Path, head: Head) -> Any:
    """The model as plain transformers loads it, nothing left over and nothing made up."""
    model, found = zoo.plain(folder, head, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model


def adapted(base: Path, adapter: Path) -> Any:
    head = head_of(adapter, base)
    model = zoo.plain(base, head, ignore_mismatched_sizes=True)
    if head.classifies:
        model.config.pad_token_id = 0
    return peftctl.load(model, adapter)


@pytest.mark.parametrize("name", zoo.BASES)
def test_merged_says_what_the_adapter_says(name: str, write: Write, tmp_path: Path) -> None:
    base, adapter, head = write(name)
    assert head_of(adapter, base) == head.with_labels(zoo.LABELS if head.classifies else ())
    report = merge(base, adapter, tmp_path / "out")
    assert report["model"] == head.what
    merged = whole(tmp_path / "out", head)
    expected = zoo.logits(adapted(base, adapter), head)
    torch.testing.assert_close(zoo.logits(merged, head), expected, rtol=0, atol=2e-5)
    assert expected.abs().max() > 0.1
    # HF PEFT says the same of the adapter
    oracle = peft.PeftModel.from_pretrained(zoo.plain(base, head_of(adapter, base)), adapter)
    if head.classifies:
        oracle.config.pad_token_id = 0
    torch.testing.assert_close(zoo.logits(oracle, head), expected, rtol=0, atol=2e-5)
    if head.classifies:
        assert merged.config.id2label == dict(enumerate(zoo.LABELS))
        assert merged.config.label2id == {label: number for number, label in enumerate(zoo.LABELS)}
        assert merged.config.architectures == [type(merged).__name__]
        assert expected.shape[-1] == len(zoo.LABELS)


@pytest.mark.parametrize("name", zoo.BASES)
def test_layer_by_layer(name: str, write: Write, tmp_path: Path) -> None:
    base, adapter, _ = write(name)
    at_once = merge(base, adapter, tmp_path / "one")["proof"]
    layered = merge(base, adapter, tmp_path / "two", memory=0)["proof"]
    assert layered["difference"] < 1e-5
    assert layered["adapter_from_base"] == pytest.approx(at_once["adapter_from_base"], rel=1e-3)
    assert layered["adapter_from_base"]["max_difference"] > 0.01


IN_FULL = ["t5 1.1", "bert inside", "llama, tokens", "git"]


@pytest.mark.parametrize("name", IN_FULL)
@pytest.mark.parametrize("kind", ["ia3", "dora", "full"])
def test_other_methods_that_merge(name: str, kind: str, write: Write, tmp_path: Path) -> None:
    base, adapter, head = write(name, kind)
    merge(base, adapter, tmp_path / "out")
    expected = zoo.logits(adapted(base, adapter), head)
    torch.testing.assert_close(zoo.logits(whole(tmp_path / "out", head), head), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("t5", "bottleneck"), ("bert", "bottleneck"), ("t5", "prompt"), ("bert", "prompt"), ("llama", "prefix")],
)
def test_what_is_more_than_a_change_of_weights(name: str, kind: str, write: Write, tmp_path: Path) -> None:
    base, adapter, _ = write(name, kind)
    with pytest.raises(NotMergeable, match=rf"`{kind}` does not merge"):
        merge(base, adapter, tmp_path / "into" / "out")
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize(
    "name", ["t5", "bart", "bert", "distilbert", "roberta", "llama", "gpt2", "blip", "git", "llava"]
)
def test_of_a_quantised_base(name: str, write: Write, tmp_path: Path) -> None:
    base, _, head = write(name)
    head = head.with_labels(zoo.LABELS if head.classifies else ())
    how = Quantised(kind="nf4", double=True, dtype=torch.float32)
    found = load(how.block(base), head)
    tied = {f"{site}.weight" for site, m in modules(found.model) if hosts.is_quantised(m)}
    assert tied == linears(skeleton(base, "base", head), head).keys()
    fields = {"modules_to_save": list(found.new)} if found.new else {}
    peftctl.attach(found.model, peftctl.METHODS["lora"](r=4, alpha=8, target_modules="all-linear", **fields))
    tiny.stir(found.model)
    adapter = peftctl.save(found.model, tmp_path / "quantised")
    (adapter / ORIGIN).write_bytes(origin_bytes(base, "base", head.labels))
    live = zoo.logits(found.model, head)
    merge(base, adapter, tmp_path / "trained", into="dequantised", quantised=how)
    torch.testing.assert_close(zoo.logits(whole(tmp_path / "trained", head), head), live, rtol=0, atol=1e-4)
    report = merge(base, adapter, tmp_path / "out", quantised=how)
    expected = zoo.logits(adapted(base, adapter), head)
    torch.testing.assert_close(zoo.logits(whole(tmp_path / "out", head), head), expected, rtol=0, atol=2e-5)
    assert report["proof"]["merged_from_quantised_run"]["relative_norm"] > 1e-3


RUN = ["t5", "bert inside", "roberta", "llama", "bert, tokens", "blip"]


def run_examples(card: str, **places: Path) -> list[Any]:
    """What `model` is after each example of a card, its own folder and its base's put in."""
    for name, place in places.items():
        card = card.replace({"here": HERE, "base": '"base"'}[name], {"here": str(place), "base": f'"{place}"'}[name])
    found: list[Any] = []
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, names)
        found.append(names["model"])
    return found


@pytest.mark.parametrize("name", RUN)
def test_the_examples_of_the_cards_run(name: str, write: Write, tmp_path: Path) -> None:
    base, adapter, head = write(name)
    expected = zoo.logits(adapted(base, adapter), head)
    export(str(adapter), tmp_path / "peft", format="peft")
    merge_verb(str(adapter), tmp_path / "merged")
    facts = Facts(base="base", method="`lora`", recipe="{}", counts={}, head=head_of(adapter, base))
    cards = {"peft": (tmp_path / "peft" / "README.md").read_text(), "merged": card(replace(facts, merged=True))}
    for kind, text in cards.items():
        models = run_examples(text, here=tmp_path / kind, base=base)
        assert len(models) == (1 if kind == "merged" else 2)
        for model in models:
            if head.classifies:
                model.config.pad_token_id = 0
            torch.testing.assert_close(zoo.logits(model, head), expected, rtol=0, atol=2e-5)


def test_the_example_of_a_method_of_our_own(write: Write, tmp_path: Path) -> None:
    base, adapter, head = write("bert inside", "bottleneck")
    facts = Facts(
        base="base", method="`bottleneck`", recipe="{}", counts={}, head=head.with_labels(zoo.LABELS), peft=False
    )
    [model] = run_examples(card(facts), here=adapter, base=base)
    torch.testing.assert_close(zoo.logits(model, head), zoo.logits(adapted(base, adapter), head), rtol=0, atol=1e-6)


def test_pictures_that_only_their_processor_cuts(tmp_path: Path) -> None:
    base = base_of(zoo.qwen(), tmp_path / "base")
    adapter = attached(base, PICTURES, tmp_path / "adapter", target_modules=["q_proj", "fc1", "qkv"])
    said: list[str] = []
    report = merge(base, adapter, tmp_path / "out", say=said.append)
    assert report["proof"]["inputs"] == ["input_ids", "attention_mask"]
    assert any("proved with texts alone" in line for line in said)
    assert report["proof"]["adapter_from_base"]["max_difference"] > 0.01
    assert {name.split(".")[-2] for name in report["tensors"]["changed"]} == {"q_proj", "fc1", "qkv"}
    whole(tmp_path / "out", PICTURES)


def test_names_as_the_first_bert_had_them(write: Write, tmp_path: Path) -> None:
    base, adapter, head = write("bert")
    stored = load_file(base / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored.items()
    }
    assert old.keys() != stored.keys()
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    report = merge(base, adapter, tmp_path / "out", memory=0)
    assert "classifier.weight" in report["tensors"]["new"]
    assert all(name.startswith("cls.") for name in report["tensors"]["left_behind"])
    expected = zoo.logits(adapted(base, adapter), head)
    torch.testing.assert_close(zoo.logits(whole(tmp_path / "out", head), head), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert inside", "llama", "t5", "blip"])
def test_sixteen_bits(name: str, dtype: Any, write: Write, tmp_path: Path) -> None:
    base, adapter, head = write(name)
    merge(base, adapter, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {getattr(torch, dtype)}
    expected = zoo.logits(adapted(base, adapter), head)
    torch.testing.assert_close(zoo.logits(whole(tmp_path / "out", head), head), expected, rtol=0, atol=0.1)


def test_another_head_in_the_base_makes_room(tmp_path: Path) -> None:
    config = hf.BertConfig(**zoo.ENCODER, num_labels=3, problem_type="multi_label_classification")
    base = base_of(hf.BertForSequenceClassification(config), tmp_path / "base")
    adapter = attached(base, SEQUENCES, tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "out")
    assert set(report["tensors"]["new"]) == {"classifier.weight", "classifier.bias"}
    merged = whole(tmp_path / "out", SEQUENCES)
    expected = zoo.logits(adapted(base, adapter), SEQUENCES)
    torch.testing.assert_close(zoo.logits(merged, SEQUENCES), expected, rtol=0, atol=2e-5)
    assert (merged.config.num_labels, merged.config.problem_type) == (4, None)


def test_an_adapter_without_the_head_that_its_base_lacks(write: Write, tmp_path: Path) -> None:
    base, adapter, _ = write("llama")
    file = adapter / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "score" not in k}, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    with pytest.raises(AdapterError, match=r"`score\.weight` is not in the base, and not in the adapter"):
        merge(base, adapter, tmp_path / "into" / "out")
    assert not (tmp_path / "into").exists()


def test_a_folder_of_peft_says_how_many_labels_by_its_head(write: Write, tmp_path: Path) -> None:
    base, adapter, head = write("roberta")
    (adapter / ORIGIN).unlink()
    assert head_of(adapter, base) == head.with_labels(("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"))
    merge(base, adapter, tmp_path / "out")
    expected = zoo.logits(adapted(base, adapter), head)
    torch.testing.assert_close(zoo.logits(whole(tmp_path / "out", head), head), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("labels", ["bad", [1, 2], ["a", "a"], {"a": 0}])
def test_labels_that_are_none(labels: Any, write: Write, tmp_path: Path) -> None:
    base, adapter, _ = write("llama")
    (adapter / ORIGIN).write_text(json.dumps({"labels": labels}))
    with pytest.raises(RunError, match="`labels` is no list of different texts"):
        merge(base, adapter, tmp_path / "out")
