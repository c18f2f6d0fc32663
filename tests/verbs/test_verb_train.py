"""`peftctl train`: what a run folder holds, and that others can read it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_chat
import torch
from safetensors.torch import load_file

import peftctl
from peftctl import recipe as recipes
from peftctl.verbs.run_folder import RunFolder


def test_a_run_folder_holds_everything(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names == {"recipe.yaml", "provenance.json", "adapter", "checkpoints", "metrics.jsonl", "run.lock"}
    adapter = {path.name for path in (finished / "adapter").iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "peftctl.json", "README.md"}
    assert adapter == files
    origin = json.loads((finished / "adapter" / "peftctl.json").read_text())["base"]
    provenance = json.loads((finished / "provenance.json").read_text())["base"]
    assert origin == provenance | {"name": "tiny-llama"}
    assert (finished / "adapter" / "chat_template.jinja").read_text() == tiny_chat.TEMPLATE
    assert not list(finished.rglob(".tmp-*"))


def test_the_recipe_reads_back_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe_file: Any):
    monkeypatch.chdir(tmp_path)
    wanted = recipes.read(recipe_file(trainer={"steps": 1}), ["method.r=2", "seed=3"])
    peftctl.train(wanted)
    assert recipes.read_run(tmp_path / "run") == wanted
    assert recipes.differences(recipes.read_run(tmp_path / "run"), wanted) == []
    assert "name_or_path: /" in (tmp_path / "run" / "recipe.yaml").read_text()  # the same from anywhere


def test_peft_loads_the_adapter_and_computes_the_same(finished: Path, base: Path):
    from peft import PeftModel

    ours = peftctl.load(tiny_chat.plain(base), finished / "adapter")
    theirs = PeftModel.from_pretrained(tiny_chat.plain(base), finished / "adapter").eval()
    before = tiny.logits(tiny_chat.plain(base))
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), atol=1e-6, rtol=0)
    assert (tiny.logits(ours) - before).abs().max() > 0.05
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_the_journal_tells_every_step(finished: Path):
    told = tiny_chat.steps(finished)
    assert [event["step"] for event in told] == [1, 2, 3, 4, 5, 6]
    assert all(event["steps"] == 6 and event["seconds"] > 0 and event["memory"] > 0 for event in told)
    assert all(math.isfinite(event["loss"]) and event["gradient_norm"] > 0 for event in told)
    assert [event["learning_rate"] for event in told] == sorted((e["learning_rate"] for e in told), reverse=True)
    assert told[-1]["loss"] < told[0]["loss"]
    assert [event["step"] for event in tiny_chat.journal(finished) if event["event"] == "eval"] == [3, 6]
    saved = [event["step"] for event in tiny_chat.journal(finished) if event["event"] == "saved"]
    assert {2, 4, 6} <= set(saved)
    # eleven rows in steps of four, each once an epoch
    assert sum(event["tokens"] for event in told[:3]) == sum(event["tokens"] for event in told[3:])


def test_the_first_loss_is_the_base_models(finished: Path, base: Path, data: Path, made: Callable[..., Any], tmp_path):
    peftctl.train(made(trainer={"steps": 1, "batch_size": 11}), output=tmp_path / "run")
    total, count = 0.0, 0
    model, tokenizer = tiny_chat.plain(base), tiny_chat.tokenizer()
    for row in map(json.loads, (data / "train.jsonl").read_text().splitlines()):
        asked = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        labels = torch.tensor([[-100] * len(asked) + whole[len(asked) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([whole]), labels=labels).loss
        total, count = total + float(loss) * (len(whole) - len(asked)), count + len(whole) - len(asked)
    [step] = tiny_chat.steps(tmp_path / "run")
    assert step["loss"] == pytest.approx(total / count, rel=1e-5)  # B starts at zero: adapter and base agree
    assert step["trained_tokens"] == count


def test_provenance_names_what_the_run_was_made_of(finished: Path, base: Path):
    record = RunFolder(finished).read_provenance()
    assert record["base"]["name"] == str(base)
    assert record["seed"] == 0
    assert record["rows"]["train"]["kept"] == 11
    assert record["rows"]["eval"]["kept"] == 7
    assert len(record["data"]["train"]) == len(record["data"]["eval"]) == 64
    assert record["versions"]["torch"] == version("torch")
    assert record["stop_ids"] == [tiny_chat.WORDS.index("<eos>")]


def test_the_command_prints_the_path_and_nothing_else(
    cli: Callable[..., SimpleNamespace], recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = cli("train", recipe_file(), "trainer.steps=1")
    assert (result.code, result.out) == (0, "run\n")
    assert "step 1/1" in result.err.replace(" of ", "/")
    result = cli("train", recipe_file(), "trainer.steps=1", "--output", "other", "--json")
    record = json.loads(result.out)
    assert record["path"] == "other"
    assert record["steps"] == 1
    assert record["adapter_bytes"] == (tmp_path / "other/adapter/adapter_model.safetensors").stat().st_size


def test_a_dry_run_tells_all_and_writes_nothing(
    cli: Callable[..., SimpleNamespace], recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path
):
    monkeypatch.chdir(tmp_path)
    path = recipe_file(method={"target_modules": ["q_proj", "down_proj"]}, trainer={"steps": None, "epochs": 2})
    result = cli("train", path, "--dry-run", "--json")
    plan = json.loads(result.out)
    assert result.code == 0
    assert plan["modules"] == {"q_proj": 2, "down_proj": 2}
    trainable = 2 * (4 * (32 + 32) + 4 * (48 + 32))
    assert plan["trainable_parameters"] == trainable
    assert plan["total_parameters"] == trainable + tiny_chat.plain(base).num_parameters()
    assert plan["trainable_percent"] == pytest.approx(100 * trainable / plan["total_parameters"], abs=1e-3)
    assert plan["adapter_bytes"] == 4 * trainable
    assert plan["steps"] == 6
    assert plan["rows"]["train"]["kept"] == 11
    assert plan["tokens"] > plan["trained_tokens"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    shown = cli("train", path, "--dry-run")
    assert (shown.code, shown.out) == (0, "")
    for word in ("q_proj", "down_proj", f"{trainable:,}", "6 steps", "%"):
        assert word in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_run_may_start_from_an_adapter(finished: Path, made: Callable[..., Any], tmp_path: Path, data: Path):
    from peftctl.verbs.evaluate import evaluate

    figures = evaluate(str(finished), overrides=[f"dataset.eval={data / 'train.jsonl'}"])["figures"]
    (finished / "eval.json").unlink()
    method = {"init_from": str(finished / "adapter"), "dropout": 0.0}
    peftctl.train(made(method=method, trainer={"steps": 1, "batch_size": 11}), output=tmp_path / "run")
    [step] = tiny_chat.steps(tmp_path / "run")
    assert step["loss"] == pytest.approx(figures["adapter"]["loss"], rel=1e-5)
    assert step["loss"] != pytest.approx(figures["base"]["loss"], rel=1e-2)


def test_the_rank_may_grow_from_stage_to_stage(finished: Path, made: Callable[..., Any], tmp_path: Path, data: Path):
    whole = {"steps": 1, "batch_size": 11}
    same = {"init_from": str(finished / "adapter"), "dropout": 0.0}
    peftctl.train(made(method=same, trainer=whole), output=tmp_path / "same")
    for more in ({"r": 12}, {"r": 12, "use_rslora": True}):
        peftctl.train(made(method=same | more, trainer=whole), output=tmp_path / f"grown-{len(more)}")
        [step], [reference] = tiny_chat.steps(tmp_path / f"grown-{len(more)}"), tiny_chat.steps(tmp_path / "same")
        assert step["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        tensors = load_file(tmp_path / f"grown-{len(more)}" / "adapter" / "adapter_model.safetensors")
        grown = next(tensor for key, tensor in tensors.items() if key.endswith("q_proj.lora_B.weight"))
        assert grown.shape[1] == 12
        assert grown[:, -1].abs().min() > 0  # the new ranks are trained


def test_a_smaller_rank_and_other_modules_are_refused(finished: Path, made: Callable[..., Any], tmp_path: Path):
    method = {"init_from": str(finished / "adapter"), "r": 1}
    told = r"` and 13 more: rank \d there, 1 here"
    with pytest.raises(peftctl.PeftctlError, match=told) as caught:
        peftctl.train(made(method=method), output=tmp_path / "run")
    assert len(caught.value.problems) == 1
    with pytest.raises(peftctl.PeftctlError, match="is adapted there and not here") as caught:
        peftctl.train(made(method=method | {"target_modules": ["q_proj"], "r": 8}), output=tmp_path / "run")
    assert len(caught.value.problems) == 12
    assert not (tmp_path / "run").exists()


def test_other_settings_than_where_it_started_are_told(finished: Path, made: Callable[..., Any], tmp_path: Path):
    said: list[Any] = []
    method = {"init_from": str(finished / "adapter"), "alpha": 16}
    peftctl.train(made(method=method, trainer={"steps": 1}), output=tmp_path / "run", listen=said.append)
    [warning] = [event["text"] for event in said if event["event"] == "warning"]
    assert warning == f"{finished / 'adapter'}: made with other settings than this run's: `alpha` was 8, is 16"


def test_a_run_folder_is_no_adapter_but_says_where_its_own_is(finished: Path, made: Callable[..., Any], tmp_path: Path):
    with pytest.raises(peftctl.PeftctlError, match="no adapter here") as caught:
        peftctl.train(made(method={"init_from": str(finished)}), output=tmp_path / "run")
    assert caught.value.problems[0].hint == f"that of this run is `{finished / 'adapter'}`"


def test_training_evaluates_on_as_many_rows_as_eval_says(made: Callable[..., Any], tmp_path: Path, data: Path):
    said: list[Any] = []
    peftctl.train(made(eval={"max_rows": 2}, trainer={"steps": 1}), output=tmp_path / "few", listen=said.append)
    [plan] = [event for event in said if event["event"] == "plan"]
    assert any("2 to evaluate on" in text for _, text in plan["rows"])
    tiny_chat.write_rows(tmp_path / "two.jsonl", tiny_chat.chats(2, start=40))
    two = made(dataset={"eval": str(tmp_path / "two.jsonl")}, trainer={"steps": 1})
    peftctl.train(two, output=tmp_path / "two")
    losses = [[e["loss"] for e in tiny_chat.journal(tmp_path / run) if e["event"] == "eval"] for run in ("few", "two")]
    assert losses[0] == losses[1]


def test_a_run_goes_on_without_the_adapter_that_it_started_from(
    finished: Path, made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "adapter", "first")
    recipe = made(method={"init_from": "first", "r": 6}, trainer={"steps": 4})
    peftctl.train(recipe, output="run")
    whole = Path("run/adapter/adapter_model.safetensors").read_bytes()
    for gone in ("first", "run/adapter", "run/checkpoints/step-000004"):
        shutil.rmtree(gone)
    peftctl.train(recipe, output="run", resume=True)
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == whole
