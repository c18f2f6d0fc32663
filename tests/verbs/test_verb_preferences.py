"""Learning from preferences as a user does it: what is shown and measured, what changes nothing, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chat
import torch
from safetensors.torch import load_file
from two_processes import compare, launched, torchrun

import peftctl
from peftctl.config.write import to_yaml
from peftctl.errors import DataError, GateFailed
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.export import export
from peftctl.verbs.generate import generate

TASKS = ["dpo", "orpo", "simpo", "kto"]


def pairs(number: int, start: int = 0) -> list[dict[str, Any]]:
    """The better answers end in x, the worse ones in y, of whatever length."""
    return [
        {
            "prompt": f"{chr(97 + i % 20)}{i % 7}? ",
            "chosen": "abcd"[i % 4] + "x" * (1 + i % 2),
            "rejected": "abcd"[i % 4] + "y" * (1 + i // 2 % 2),
        }
        for i in range(start, start + number)
    ]


def as_chats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": role, "content": row[key]}] for key, role in roles.items()} for row in rows]


def as_feedback(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ["rejected" if i % 3 else "chosen" for i in range(len(rows))]
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row, key in zip(rows, keys, strict=True)
    ]


@pytest.fixture
def recipe(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Recipes of a folder with rows of every kind."""
    monkeypatch.chdir(tmp_path)
    for name, rows in {
        "pairs": pairs(40),
        "held-out": pairs(16, start=40),
        "chats": as_chats(pairs(40)),
        "feedback": as_feedback(pairs(40)),
        "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(40)],
    }.items():
        tiny_chat.write_rows(tmp_path / f"{name}.jsonl", rows)

    def made(task: Any, train: str = "pairs", eval: Any = "held-out.jsonl", **trainer: Any) -> Any:
        settings = {"task": task, "steps": 12, "batch_size": 8, "micro_batch_size": 3, "save_every": 6, **trainer}
        found = tiny_chat.recipe(base, tmp_path / f"{train}.jsonl", None, trainer=settings, method={"dropout": 0.0})
        return {**found, "dataset": {**found["dataset"], "eval": eval}}

    return made


def figures(record: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    return record["figures"]["base"], record["figures"]["adapter"]


@pytest.mark.parametrize("train", ["pairs", "feedback"])
def test_kto_sets_good_answers_apart_from_bad_ones(recipe: Callable[..., Any], train: str):
    run = peftctl.train(recipe("kto", train, {"split": 0.25}, learning_rate=2e-2))["path"]
    base, tuned = figures(evaluate(run))
    assert set(base) == {"rows", "feedback_margin"}
    assert tuned["feedback_margin"] > max(base["feedback_margin"], 0) + 0.1
    base, tuned = figures(
        evaluate(run, overrides=["eval.metrics=[preference_accuracy]", "dataset.eval=held-out.jsonl"])
    )
    assert tuned["preference_accuracy"] > max(base["preference_accuracy"], 0.9)


def test_feedback_is_measured_per_token(recipe: Callable[..., Any], base: Path):
    run = peftctl.train(recipe("kto", "feedback", "feedback.jsonl", steps=2))["path"]
    record = evaluate(run, overrides=["eval.metrics=[feedback_margin,loss]"])
    model, words, sums = tiny_chat.plain(base), tiny_chat.tokenizer(), np.zeros((2, 2))
    for row in as_feedback(pairs(40)):
        asked, whole = (words(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = torch.tensor([[*whole, words.eos_token_id]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        answer = logs.gather(1, ids[0, 1:, None])[len(asked) - 1 :]
        sums[int(row["label"])] += [float(answer.sum()), len(answer)]
    (bad, good), figure = sums[:, 0] / sums[:, 1], record["figures"]["base"]
    assert figure["feedback_margin"] == pytest.approx(good - bad, abs=1e-4)
    assert figure["loss"] == pytest.approx(-good, abs=1e-4)  # of the good answers alone


@pytest.mark.parametrize("train", ["pairs", "chats"])
def test_held_out_and_named_rows_are_told_while_training(recipe: Callable[..., Any], train: str):
    heard: list[dict[str, Any]] = []
    named = {"near": f"{train}.jsonl", "far": "held-out.jsonl"}
    task = {"type": "dpo", "beta": 0.2, "variant": "ipo"}
    run = peftctl.train(recipe(task, train, named, eval_every=6), listen=heard.append)["path"]
    told = [event for event in heard if event["event"] in ("step", "eval")]
    watched = {"reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward"}
    assert all(watched <= event.keys() for event in told)
    assert [event for event in tiny_chat.journal(Path(run)) if event["event"] in ("step", "eval")] == told
    assert set(told[-1]["losses"]) == {"near", "far"}
    record = evaluate(run)
    assert set(record["figures"]["adapter"]) >= {"near/preference_accuracy", "far/preference_margin"}


def test_the_lines_of_training_tell_how_rewards_lie(recipe: Callable[..., Any], cli: Callable[..., Any]):
    Path("recipe.yaml").write_text(to_yaml(recipe({"type": "dpo", "beta": 0.2}, eval={"split": 0.2})))
    said = cli("train", "recipe.yaml")
    assert said.code == 0, said.err
    assert "step  1/12  epoch 0.25  loss 0.6931  accuracy 0.000  margin 0.000" in said.err
    assert "evaluated at step 12: loss 0." in said.err
    assert "accuracy 1.000, margin " in said.err
    said = cli("eval", "run", "eval.gates={preference_accuracy: {min: 0.8}}")
    assert "preference_accuracy" in said.err
    assert isinstance(generate("run", "a1? ", max_new_tokens=3), str)
    assert export("run", Path("exported"))["format"] == "peft"


@pytest.mark.parametrize("task", TASKS)
def test_data_shows_both_answers(recipe: Callable[..., Any], cli: Callable[..., Any], task: str):
    wanted = recipe(task)
    wanted["dataset"] |= {"max_length": 7}  # cuts the longer answers
    Path("recipe.yaml").write_text(to_yaml(wanted))
    said = cli("data", "recipe.yaml", "--rows", 4)
    assert said.code == 0, said.err
    assert ("a bad answer" if task == "kto" else "the better answer, from token") in said.out
    assert "cut to `max_length` 7" in said.err


def test_a_gate_that_is_missed(recipe: Callable[..., Any]):
    run = peftctl.train(recipe("dpo", steps=2, learning_rate=1e-5))["path"]
    with pytest.raises(GateFailed, match="preference_margin"):
        evaluate(run, overrides=["eval.gates={preference_margin: {min: 50}}"])


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_change_nothing(recipe: Callable[..., Any], task: str):
    runs = [peftctl.train(recipe(task, micro_batch_size=size), output=f"of-{size}")["path"] for size in (1, 3, 8)]
    one, *others = (Path(run) for run in runs)
    for other in others:
        for then, now in zip(tiny_chat.journal(one), tiny_chat.journal(other), strict=True):
            for key in (then.keys() & {"loss", "reward_margin", "chosen_reward", "kl"}) if "loss" in then else ():
                assert now[key] == pytest.approx(then[key], rel=1e-3, abs=1e-5), (key, then)
        first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
        for name in first:
            torch.testing.assert_close(second[name], first[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_two_processes_train_what_one_does(recipe: Callable[..., Any], tmp_path: Path, task: str):
    start = peftctl.train(recipe("sft", "sft", None, steps=4), output="sft")["adapter"]
    wanted = recipe(task, batch_size=5, steps=5)
    wanted = {**wanted, "method": {**wanted["method"], "init_from": str(Path(start).absolute())}}
    Path("recipe.yaml").write_text(to_yaml(wanted))
    code, _, err = launched(torchrun(), tmp_path)
    assert code == 0, err
    peftctl.train(wanted, output="alone")
    compare(Path("alone"), Path("run"))
    for then, now in zip(*(tiny_chat.journal(Path(run)) for run in ("alone", "run")), strict=True):
        for key in {"reward_margin", "chosen_reward", "kl"} & then.keys():
            assert now[key] == pytest.approx(then[key], rel=1e-3, abs=1e-5), (key, then)


def test_mistakes_are_told_with_a_way_out(recipe: Callable[..., Any]):
    for task, train, what, hint in (
        ("dpo", "sft", "two answers are compared, and the row has one", "`task: sft` learns from one answer"),
        ("dpo", "feedback", "two answers are compared, and the row has one", "`task: kto` learns from single answers"),
        ("kto", "sft", "nothing says whether its answer is a good one", "`completion` and `label`"),
        ("sft", "pairs", "does not train preferences", "`task: dpo` learns from both"),
        ("sft", "feedback", "no use for good and bad answers", "`task: kto` learns from both"),
    ):
        with pytest.raises(DataError) as caught:
            peftctl.train(recipe(task, train, None))
        assert f"{train}.jsonl:1: " in str(caught.value)
        assert what in str(caught.value)
        assert hint in str(caught.value.problems[0].hint)


def test_answers_to_one_prompt_have_no_other_to_compare_with(recipe: Callable[..., Any], tmp_path: Path):
    rows = [{"prompt": "a? ", "completion": "b" * (1 + i), "label": i % 2 == 0} for i in range(6)]
    tiny_chat.write_rows(tmp_path / "one.jsonl", rows)
    with pytest.raises(DataError, match="all answers are to one prompt"):
        peftctl.train(recipe("kto", "one", None))
    assert not Path("run").exists()


def test_the_rows_of_a_run_say_where_they_went(recipe: Callable[..., Any]):
    run = Path(peftctl.train(recipe("kto", steps=1))["path"])
    counts = json.loads((run / "provenance.json").read_text())["rows"]
    assert (counts["train"]["kept"], counts["eval"]["kept"]) == (40, 16)
