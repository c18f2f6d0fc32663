"""Pairs of answers: losses and rewards are TRL's, the reference is where training started, runs prefer the better."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_preferences as tiny
import torch
from safetensors.torch import load_file

import peftctl
from peftctl.data.encode import Encoded
from peftctl.data.formats import Pair
from peftctl.engine.attach import activate, methods
from peftctl.engine.disk import load
from peftctl.errors import DataError, RecipeError
from peftctl.tasks.dpo import DPO
from peftctl.tasks.preference import parted
from peftctl.tasks.task import REFERENCE
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_base(tmp_path_factory.mktemp("model") / "tiny-llama")


def encoded(rows: list[dict[str, Any]], **settings: Any) -> list[Encoded]:
    return tiny.encoded(rows, DPO().reading, **settings)


@pytest.mark.parametrize("rows", [tiny.texts(6), tiny.chats(6)], ids=["texts", "chats"])
@pytest.mark.parametrize(
    ("task", "theirs"),
    [
        (DPO(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
        (DPO(beta=0.5, variant="hinge"), {"loss_type": ["hinge"], "beta": 0.5}),
        (DPO(beta=0.2, variant="ipo"), {"loss_type": ["ipo"], "beta": 0.2}),
        (DPO(variant="robust", label_smoothing=0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}),
    ],
    ids=["sigmoid", "hinge", "ipo", "robust"],
)
@pytest.mark.parametrize("start", ["base", "adapter"])
def test_losses_and_rewards_are_those_of_trl(
    base: Path, tmp_path: Path, task: DPO, theirs: dict[str, Any], rows: list[dict[str, Any]], start: str
):
    from datasets import Dataset as Rows
    from trl import DPOConfig, DPOTrainer

    model, copy = tiny.stirred(base), tiny.trained_by_peft(base)
    longest = max(len(part) for row in encoded(rows) for part in parted(row)) - 1  # so one of them is cut
    if start == "adapter":
        tiny.copied(tiny.stirred(base, seed=3), copy, tmp_path / "start")
        load(model, tmp_path / "start", REFERENCE)
        activate(model, "default")
    where = {"output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "report_to": []}
    trainer = DPOTrainer(
        model=copy,
        args=DPOConfig(**where, **theirs, max_length=longest),
        train_dataset=Rows.from_list(rows),
        processing_class=tiny_chat.tokenizer(),
    )
    tiny.copied(model, trainer.model, tmp_path / "adapter")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    loss = float(trainer.compute_loss(trainer.model.train(), batch).detach())
    told = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    made = encoded(rows, max_length=longest)
    assert any(row.truncated for row in made)
    ours = {name: float(total.detach()) / len(rows) for name, total in task.sums(model, task.collate(made, 0)).items()}
    assert ours["loss"] == pytest.approx(loss, abs=1e-4)
    assert ours["chosen_reward"] == pytest.approx(told["rewards/chosen"], abs=1e-4)
    assert ours["rejected_reward"] == pytest.approx(told["rewards/rejected"], abs=1e-4)
    assert ours["reward_margin"] == pytest.approx(told["rewards/margins"], abs=1e-4)
    assert ours["reward_accuracy"] == pytest.approx(told["rewards/accuracies"], abs=1e-4)
    assert max(abs(ours["chosen_reward"]), abs(ours["reward_margin"])) > 0.01


def test_smoothed_labels_are_a_mixture_of_both_orders(base: Path):
    model, rows = tiny.stirred(base), tiny.texts(4)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    right, wrong = (DPO().loss(model, DPO().collate(encoded(each), 0)) for each in (rows, swapped))
    smoothed = DPO(label_smoothing=0.3).loss(model, DPO().collate(encoded(rows), 0))
    torch.testing.assert_close(smoothed, 0.7 * right + 0.3 * wrong)


def test_long_pairs_go_whole():
    long = [{"prompt": "a? ", "chosen": "b", "rejected": "c" * 20}, {"prompt": "a? ", "chosen": "b", "rejected": "c"}]
    assert len(encoded(long, max_length=10, on_long="drop")) == 1
    assert encoded(long, max_length=10)[0].truncated
    with pytest.raises(DataError, match="answers that are compared are not split"):
        encoded(long, on_long="split")
    with pytest.raises(DataError, match="only answers are compared"):
        encoded(long, train_on="all")
    with pytest.raises(DataError, match="two answers are compared, and the row has one"):
        DPO().accept(Pair("rows.jsonl:1", "a", "b"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "ipo", "label_smoothing": 0.1}, "`ipo` has none"),
        ({"label_smoothing": 0.5}, "worse would be better"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DPO(**fields)


@pytest.fixture
def recipe(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Recipes whose better answers are known by their last letter."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{chr(97 + i % 20)}{i % 7}? ", "chosen": "abcd"[i % 4] + "x", "rejected": "abcd"[i % 4] + "y"}
        for i in range(56)
    ]
    tiny_chat.write_rows(tmp_path / "pairs.jsonl", rows[:40])
    tiny_chat.write_rows(tmp_path / "held-out.jsonl", rows[40:])
    sft = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"]} for i, row in enumerate(rows)
    ]
    tiny_chat.write_rows(tmp_path / "sft.jsonl", sft)

    def made(task: Any, method: dict[str, Any] | None = None, train: str = "pairs.jsonl", **trainer: Any) -> Any:
        settings = {"task": task, "steps": 20, "batch_size": 8, "micro_batch_size": 3, "save_every": 10, **trainer}
        held_out = tmp_path / "held-out.jsonl" if train == "pairs.jsonl" else None
        found = tiny_chat.recipe(base, tmp_path / train, held_out, trainer=settings)
        return {**found, "method": {"type": "lora", "r": 8, "alpha": 16, **(method or {})}}

    return made


@pytest.mark.parametrize(
    "task", ["dpo", "orpo", "simpo", "kto", {"type": "dpo", "variant": "ipo", "beta": 0.2}], ids=str
)
def test_it_prefers_the_better_answer_to_rows_it_has_not_seen(recipe: Callable[..., Any], task: Any):
    run = peftctl.train(recipe(task, learning_rate=2e-2))["path"]
    record = evaluate(run, overrides=["eval.metrics=[preference_accuracy,preference_margin]"])
    base, tuned = record["figures"]["base"], record["figures"]["adapter"]
    assert tuned["preference_accuracy"] > max(base["preference_accuracy"], 0.9)
    assert tuned["preference_margin"] > base["preference_margin"]


METHODS_OF: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "alpha": 16},
    "qlora": {"type": "lora", "r": 8, "alpha": 16},
    "modules_to_save": {"type": "lora", "r": 8, "alpha": 16, "modules_to_save": ["lm_head"]},
    "dora": {"r": 4, "alpha": 8},
    "adalora": {"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1},
    "ia3": {},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "bottleneck": {},
    "vera": {"r": 8},
}


@pytest.mark.parametrize(
    ("task", "kind"),
    [*(("dpo", kind) for kind in METHODS_OF), *(("kto", kind) for kind in ("lora", "adalora", "prefix"))],
)
def test_after_sft_the_reference_is_the_adapter_it_starts_from(
    recipe: Callable[..., Any], task: str, kind: str, tmp_path: Path
):
    method = {"type": kind, **METHODS_OF[kind]}

    def of(task: str, train: str, settings: dict[str, Any]) -> Any:
        made = recipe(task, train=train, learning_rate=1e-2, steps=6, save_every=3)
        quantization = "nf4" if kind == "qlora" else "none"
        return {**made, "model": {**made["model"], "quantization": quantization}, "method": settings}

    first = peftctl.train(of("sft", "sft.jsonl", method), output=tmp_path / "sft")["adapter"]
    wanted = of(task, "pairs.jsonl", {**method, "init_from": first})
    heard: list[dict[str, Any]] = []
    run = Path(peftctl.train(wanted, output=tmp_path / "run", listen=heard.append)["path"])
    start, *later = (event for event in heard if event["event"] == "step")
    assert start["loss"] == pytest.approx(math.log(2) if task == "dpo" else 0.5, abs=1e-6)
    assert (start["reward_margin"], start["chosen_reward"], start["rejected_reward"]) == (0, 0, 0)
    assert any(event["reward_margin"] != 0 for event in later)
    tensors = [load_file(f"{folder}/adapter_model.safetensors") for folder in (first, run / "adapter", run / "start")]
    assert tensors[0].keys() == tensors[1].keys() == tensors[2].keys()
    assert all(torch.equal(tensors[0][name], tensors[2][name]) for name in tensors[0])
    for file in run.rglob("checkpoints/*/*.safetensors"):
        assert not [name for name in load_file(file) if f".{REFERENCE}." in name], file
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    peftctl.train(wanted, output=run, resume=True)
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors[1].items())


def test_the_reference_stays_as_it_was(recipe: Callable[..., Any], tmp_path: Path, base: Path):
    """Rewards that are told at the end are those of the trained adapter against the one it started from."""
    first = peftctl.train(recipe("sft", train="sft.jsonl", learning_rate=1e-2), output=tmp_path / "sft")["adapter"]
    heard: list[dict[str, Any]] = []
    settings = recipe("dpo", {"init_from": first}, learning_rate=1e-2, eval_every=20)
    run = peftctl.train(settings, output=tmp_path / "dpo", listen=heard.append)["path"]
    told = [event for event in heard if event["event"] == "eval"][-1]
    model = tiny.plain(base)
    load(model, first, REFERENCE)
    load(model, f"{run}/adapter")
    assert set(methods(model)) == {REFERENCE, "default"}
    activate(model, "default")
    rows = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    sums = DPO().sums(model.eval(), DPO().collate(encoded(rows), 0))
    assert told["loss"] == pytest.approx(float(sums["loss"].detach()) / len(rows), abs=1e-4)
    assert told["reward_margin"] == pytest.approx(float(sums["reward_margin"]) / len(rows), abs=1e-4)


def test_merge_and_generate(recipe: Callable[..., Any], tmp_path: Path):
    run = peftctl.train(recipe("dpo", learning_rate=2e-2))["path"]
    assert isinstance(generate(run, "a1? ", max_new_tokens=4), str)
    assert merge(run, tmp_path / "merged")["proof"]["difference"] < 1e-4


def test_what_cannot_be(recipe: Callable[..., Any]):
    with pytest.raises(RecipeError, match="`dpo` is compared with the base while it trains, which this method changes"):
        peftctl.train({**recipe("dpo"), "method": {"type": "full"}})
    with pytest.raises(RecipeError, match="rows of `dpo` do not lie end to end"):
        peftctl.train(recipe("dpo", packing="on"))
    with pytest.raises(RecipeError, match=r"trainer\.task\.beta: expected above 0"):
        peftctl.train(recipe({"type": "dpo", "beta": 0}))
    with pytest.raises(DataError, match="two answers are compared, and the row has one"):
        peftctl.train(recipe("dpo", train="sft.jsonl"))
