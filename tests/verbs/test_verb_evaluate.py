"""`peftctl eval`: every figure against a slow computation with plain transformers and peft."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat
import torch

import peftctl
from peftctl.fast.trunk import Trunk
from peftctl.verbs.evaluate import evaluate


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, elsewhere: it may be written to."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def held_out(data: Path) -> list[Any]:
    return [json.loads(line)["messages"] for line in (data / "held-out.jsonl").read_text().splitlines()]


@pytest.fixture
def models(finished: Path, base: Path) -> dict[str, Any]:
    """Base and adapter, the second as the real peft has it."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(tiny_chat.plain(base), finished / "adapter").eval()
    return {"base": tiny_chat.plain(base), "adapter": adapted}


@torch.no_grad()
def log_probability(model: Any, asked: str, answer: str, end: str = "<eos>") -> tuple[float, int]:
    """Of an answer and its `end`, token by token, one row alone."""
    tokenizer = tiny_chat.tokenizer()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    ids = prompt["input_ids"] + tokenizer(answer + end, add_special_tokens=False)["input_ids"]
    logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start = len(prompt["input_ids"])
    return sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))), len(ids) - start


def test_base_and_adapter_take_the_fast_path(run: Path, monkeypatch: pytest.MonkeyPatch):
    adapted = []

    def through(self: Trunk, *given: Any) -> torch.Tensor:
        adapted.append(any("adapters" in name for name, _ in self.model.named_parameters()))
        return own(self, *given)

    own = Trunk.through
    monkeypatch.setattr(Trunk, "through", through)
    evaluate(str(run))
    tried = 3  # each of two layers, and the whole
    assert adapted.count(False) > tried
    assert adapted.count(True) > tried


def test_figures_are_those_of_a_slow_computation(run: Path, models: dict[str, Any], held_out: list[Any]):
    figures = evaluate(str(run))["figures"]
    assert list(figures) == ["base", "adapter"]
    for name, model in models.items():
        right, total, tokens = 0, 0.0, 0
        for user, assistant in held_out:
            scores = {label: log_probability(model, user["content"], label, "")[0] for label in tiny_chat.LABELS}
            right += max(scores, key=lambda label: scores[label]) == assistant["content"]
            score, count = log_probability(model, user["content"], assistant["content"])
            total, tokens = total - score, tokens + count
        assert figures[name]["rows"] == len(held_out)
        assert figures[name]["accuracy"] == right / len(held_out)
        assert figures[name]["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert figures[name]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
        assert figures[name]["perplexity"] == pytest.approx(math.exp(figures[name]["loss"]), rel=1e-12)
    assert figures["adapter"]["loss"] < figures["base"]["loss"]


def test_exact_match_counts_what_one_by_one_generation_says(
    run: Path, models: dict[str, Any], held_out: list[Any], tmp_path: Path
):
    tokenizer, rows, expected = tiny_chat.tokenizer(), [], {"base": 0, "adapter": 0}
    for number, (user, _) in enumerate(held_out):
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_tensors="pt")
        width = prompt["input_ids"].shape[1]
        said = {}
        for name, model in models.items():
            out = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
            said[name] = tokenizer.decode(out[0, width:], skip_special_tokens=True).strip()
        wanted = said["adapter"] if number % 3 else said["base"]
        rows.append({"messages": [user, {"role": "assistant", "content": wanted or "nothing"}]})
        for name in said:
            expected[name] += said[name] == (wanted or "nothing")
    assert 0 < expected["adapter"] < len(rows)
    data = tiny_chat.write_rows(tmp_path / "said.jsonl", rows)
    changes = [f"dataset.eval={data}", "eval.metrics=[exact_match]", "eval.labels=[]", "eval.max_new_tokens=6"]
    figures = evaluate(str(run), overrides=changes)["figures"]
    assert {name: figures[name]["exact_match"] for name in figures} == {
        name: count / len(rows) for name, count in expected.items()
    }
    assert set(figures["base"]) == {"rows", "exact_match"}


@pytest.mark.parametrize("size", [1, 3, 50])
def test_figures_do_not_depend_on_the_batch(run: Path, size: int):
    changes = ["eval.metrics=[loss,exact_match]", f"eval.batch_size={size}"]
    expected = evaluate(str(run), overrides=changes[:1])["figures"]
    for name, figures in evaluate(str(run), overrides=changes)["figures"].items():
        assert figures == pytest.approx(expected[name], rel=1e-6)


def test_an_answer_outside_the_labels_is_an_error_with_its_place(run: Path, tmp_path: Path):
    rows = tiny_chat.chats(3)
    rows[1]["messages"][1]["content"] = "perhaps"
    data = tiny_chat.write_rows(tmp_path / "odd.jsonl", rows)
    with pytest.raises(peftctl.PeftctlError) as caught:
        evaluate(str(run), overrides=[f"dataset.eval={data}"])
    [(text, hint)] = caught.value.problems
    assert text == f"{data}:2: the answer `perhaps` is none of `eval.labels`"
    assert hint == "labels: `yes`, `no`, `maybe`"
    assert not (run / "eval.json").exists()


def test_eval_json_is_what_was_returned(run: Path, cli: Callable[..., SimpleNamespace], monkeypatch, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = cli("eval", run)
    assert (result.code, result.out) == (0, f"{run}/eval.json\n")
    record = json.loads((run / "eval.json").read_text())
    assert set(record) == {
        *("model", "adapter", "adapter_sha256", "data", "evaluated", "settings"),
        *("figures", "intervals", "compared", "gates"),
    }
    assert set(record["figures"]["adapter"]) == {"rows", "loss", "perplexity", "accuracy"}
    for word in ("base", "adapter", "accuracy", f"{record['figures']['adapter']['loss']:.4g}"):
        assert word in result.err
    assert json.loads(cli("eval", run, "--json").out)["figures"] == record["figures"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_recipe_without_a_run_measures_its_base(
    recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path, cli: Callable[..., SimpleNamespace]
):
    monkeypatch.chdir(tmp_path)
    result = cli("eval", recipe_file(), "--json")
    assert result.code == 0
    record = json.loads(result.out)
    assert record["adapter"] is None
    assert list(record["figures"]) == ["base"]
    assert not (tmp_path / "run").exists()  # so that `train` still starts there
    both = evaluate("recipe.yaml", adapter=str(run / "adapter"))["figures"]
    assert both["base"] == record["figures"]["base"]
    assert both["adapter"]["loss"] == pytest.approx(evaluate(str(run))["figures"]["adapter"]["loss"], rel=1e-6)


def test_rows_held_out_of_the_training_rows_are_measured(made: Callable[..., Any], tmp_path: Path):
    wanted = made(trainer={"steps": 2})
    wanted["dataset"]["eval"] = {"split": 0.3}
    peftctl.train(wanted, output=tmp_path / "run")
    figures = evaluate(str(tmp_path / "run"))["figures"]
    told = [event for event in tiny_chat.journal(tmp_path / "run") if event["event"] == "eval"]
    assert figures["adapter"]["rows"] == 3
    assert figures["adapter"]["loss"] == pytest.approx(min(event["loss"] for event in told), rel=1e-5)


def test_without_rows_to_measure_on_it_says_so(finished: Path):
    with pytest.raises(peftctl.PeftctlError, match="nothing to evaluate on"):
        evaluate(str(finished), overrides=["dataset.eval=null"])


def test_another_adapters_figures_stay_out_of_the_runs_card(run: Path, finished: Path, cli: Any, tmp_path: Path):
    from toy_run import steps_in

    checkpoint = run / "checkpoints" / f"step-{steps_in(run / 'checkpoints')[0]:06d}" / "adapter"
    assert cli("eval", run, "--adapter", checkpoint).code == 0
    assert cli("export", run, "--format", "peft", "--output", tmp_path / "before").code == 0
    assert "## Evaluation" not in (tmp_path / "before" / "README.md").read_text()
    assert cli("eval", run).code == 0
    assert cli("export", run, "--format", "peft", "--output", tmp_path / "after").code == 0
    assert "## Evaluation" in (tmp_path / "after" / "README.md").read_text()


def test_answers_end_where_training_ended_them_whatever_is_measured(made: Callable[..., Any]):
    from peftctl import recipe as recipes
    from peftctl.verbs.rows import evaluation_rows

    [one] = evaluation_rows(recipes.coerce(made()), tiny_chat.tokenizer(), lambda line: None).values()
    assert one.encoder.stop_ids == {tiny_chat.WORDS.index("<eos>")}


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_preferences_are_compared_as_a_slow_computation_does(
    run: Path, models: dict[str, Any], held_out: list[Any], tmp_path: Path, form: str
):
    rows, pairs = [], []
    for number, (user, assistant) in enumerate(held_out):
        worse = next(label for label in tiny_chat.LABELS if label != assistant["content"])
        better, worse = (assistant["content"], worse) if number % 3 else (worse, assistant["content"])
        pairs.append((user["content"], better, worse))
        said = [{"role": "assistant", "content": text} for text in (better, worse)]
        before = [user] if form == "conversations" else []
        row = {key: [*before, one] for key, one in zip(("chosen", "rejected"), said, strict=True)}
        rows.append(row if before else {"prompt": [user], **row})
    data = tiny_chat.write_rows(tmp_path / "pairs.jsonl", rows)
    metrics = "eval.metrics=[preference_accuracy,preference_margin,loss]"
    record = evaluate(str(run), overrides=[f"dataset.eval={data}", metrics, "eval.labels=[]"])
    for name, model in models.items():
        leads = [log_probability(model, q, a)[0] - log_probability(model, q, b)[0] for q, a, b in pairs]
        figures = record["figures"][name]
        assert figures["preference_accuracy"] == sum(lead > 0 for lead in leads) / len(leads)
        assert figures["preference_margin"] == pytest.approx(sum(leads) / len(leads), abs=1e-4)
        scored = [log_probability(model, q, a) for q, a, _ in pairs]
        loss = -sum(score for score, _ in scored) / sum(count for _, count in scored)
        assert figures["loss"] == pytest.approx(loss, rel=1e-5), "of the better answers"
    low, high = record["intervals"]["base"]["preference_accuracy"]
    assert low < record["figures"]["base"]["preference_accuracy"] < high


def test_what_cannot_be_compared_is_told(run: Path, tmp_path: Path):
    changes = ["eval.metrics=[preference_accuracy]", "eval.labels=[]"]
    with pytest.raises(peftctl.PeftctlError, match="two answers are compared, and the row has one; rows have `prompt`"):
        evaluate(str(run), overrides=changes)
    with pytest.raises(peftctl.PeftctlError, match="rows to train on have one answer each"):
        evaluate(str(run), overrides=[*changes, "dataset.eval={split: 0.5}"])
    long = {"prompt": "a" * 30, "chosen": "b", "rejected": "c" * 40}
    data = tiny_chat.write_rows(tmp_path / "pairs.jsonl", [long, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    more = [f"dataset.eval={data}", "dataset.max_length=50", "dataset.on_long=drop", "dataset.max_skipped=0.6"]
    assert evaluate(str(run), overrides=[*changes, *more])["figures"]["base"]["rows"] == 1  # a pair is left out whole
