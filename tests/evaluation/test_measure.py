"""Figures over rows: against slow computations, and against the model that they are taken of."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_chat
import torch

from peftctl.data.encode import Encoded, Encoder
from peftctl.data.file import Row
from peftctl.data.formats import Parsed, check
from peftctl.errors import DataError
from peftctl.evaluation.answers import answer as answer_of
from peftctl.evaluation.evaluation import Evaluation
from peftctl.evaluation.gate import Gate
from peftctl.evaluation.loss import means
from peftctl.evaluation.measure import confusion
from peftctl.evaluation.measure import measure as seen_by
from peftctl.evaluation.sheet import Sheet
from peftctl.tasks import Task
from peftctl.tasks.dpo import DPO
from peftctl.tasks.seq2seq import Seq2Seq
from peftctl.tasks.sft import SFT

ALL = Evaluation(metrics=["loss", "perplexity", "accuracy", "exact_match"], labels=tiny_chat.LABELS, max_new_tokens=5)


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny.build("llama")
    tiny.stir(made)
    return made


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_chat.tokenizer(), tiny_chat.TEMPLATE, 2048, "truncate")


def parsed(rows: list[Any], kind: Any = "messages") -> list[Parsed]:
    return [check(Row(f"rows.jsonl:{n}", row), kind) for n, row in enumerate(rows, 1)]


def measure(model: Any, rows: Any, encoder: Any, evaluation: Evaluation, *more: Any) -> dict[str, float]:
    """The figures that come of what is seen."""
    evaluation = evaluation.of(SFT())
    sheet = Sheet.of(rows, {"it": seen_by(model, SFT(), rows, encoder, evaluation, *more)}, evaluation.wanted)
    return {metric.name: sheet.estimate("it", metric.name) for metric in evaluation.wanted}


@torch.no_grad()
def slow_loss(model: Any, rows: list[Encoded]) -> tuple[float, int]:
    """Row by row, unpadded, in float64 after the logits."""
    total, count = 0.0, 0
    for row in rows:
        logs = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(row.labels):
            if label != -100:
                total, count = total - float(logs[position - 1, label]), count + 1
    return total, count


def without_end(model: Any, prompt: list[int], ids: list[int]) -> float:
    """Of the answer after `prompt`, without the token that ends it."""
    labels = [-100] * len(prompt) + ids[len(prompt) : -1] + [-100]
    return slow_loss(model, [SimpleNamespace(input_ids=ids, labels=labels)])[0]


def test_loss_and_perplexity(model: Any, encoder: Encoder):
    rows = parsed(tiny_chat.chats(13))
    encoded = [encoder.whole(row) for row in rows]
    total, count = slow_loss(model, encoded)
    figures = measure(model, rows, encoder, Evaluation(batch_size=4), 0)
    assert figures == {
        "loss": pytest.approx(total / count, rel=1e-5),
        "perplexity": pytest.approx(math.exp(figures["loss"]), rel=1e-12),
    }
    one = SimpleNamespace(process_index=0, num_processes=1, device="cpu", reduce=lambda value, how: value)
    assert means(model, SFT(), encoded, 4, 0, one)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_loss_over_processes_is_the_loss_of_one(model: Any, encoder: Encoder):
    encoded = [encoder.whole(row) for row in parsed(tiny_chat.chats(7))]
    total, count = slow_loss(model, encoded)
    for world in (2, 3, 5):  # the last has more processes than batches
        parts: list[Any] = []

        def keep(value: Any, how: str, parts: list[Any] = parts) -> Any:
            parts.append(value)
            return value

        for rank in range(world):
            peer = SimpleNamespace(process_index=rank, num_processes=world, device="cpu", reduce=keep)
            means(model, SFT(), encoded, 2, 0, peer)["loss"]
        assert float(sum(parts)) / count == pytest.approx(total / count, rel=1e-5)


def test_every_turn_counts_in_the_loss_and_the_last_one_in_the_accuracy(model: Any, encoder: Encoder):
    talk = [*tiny_chat.chats(1)[0]["messages"], *tiny_chat.chats(1, start=3)[0]["messages"]]
    [row] = rows = parsed([{"messages": talk}])
    encoded = encoder.whole(row)
    assert len(encoded.spans) == 2
    total, count = slow_loss(model, [encoded])
    figures = measure(model, rows, encoder, Evaluation(labels=tiny_chat.LABELS), 0)
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)
    prompt = encoder.tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
    scores = {}
    for label in tiny_chat.LABELS:
        ids = prompt + encoder.tokenizer(label + "<eos>", add_special_tokens=False)["input_ids"]
        scores[label] = without_end(model, prompt, ids)
    best = min(scores, key=lambda label: scores[label])
    assert figures["accuracy"] == float(best == talk[-1]["content"])


def test_the_end_counts_where_one_label_begins_another(model: Any, encoder: Encoder):
    labels = ["no", "no way"]
    users = [chat["messages"][0] for chat in tiny_chat.chats(6)]
    rows = parsed([{"messages": [user, {"role": "assistant", "content": "no way"}]} for user in users])
    right = 0
    for user in users:
        prompt = encoder.tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
        scores = {}
        for label in labels:
            ids = prompt + encoder.tokenizer(label + "<eos>", add_special_tokens=False)["input_ids"]
            whole = SimpleNamespace(input_ids=ids, labels=[-100] * len(prompt) + ids[len(prompt) :])
            scores[label] = slow_loss(model, [whole])[0]
        right += scores["no way"] < scores["no"]
    figures = measure(model, rows, encoder, Evaluation(labels=labels), 0)
    assert figures["accuracy"] == right / len(rows)


def test_each_different_sequence_is_scored_once(model: Any, encoder: Encoder):
    rows = parsed(tiny_chat.chats(2) * 3)
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    ticks: list[tuple[int, int]] = []
    measure(model, rows, encoder, Evaluation(labels=tiny_chat.LABELS), 0, lambda *tick: ticks.append(tick))
    hook.remove()
    assert sum(seen) == 6  # two questions, three labels; the right answer is one of them
    assert ticks == [(6, 6)]


def test_labels_of_one_token_need_one_sequence(model: Any, encoder: Encoder):
    labels = ["y", "n", "m"]
    users = [chat["messages"][0] for chat in tiny_chat.chats(8)]
    answers = [{"role": "assistant", "content": labels[i % 3]} for i in range(8)]
    rows = parsed([{"messages": [user, answer]} for user, answer in zip(users, answers, strict=True)])
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    figures = measure(model, rows, encoder, Evaluation(labels=labels, batch_size=3), 0)
    hook.remove()
    assert sum(seen) == 8
    right = 0
    for user, answer in zip(users, answers, strict=True):
        prompt = encoder.tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
        ids = {x: prompt + encoder.tokenizer(x + "<eos>", add_special_tokens=False)["input_ids"] for x in labels}
        right += min(labels, key=lambda x: without_end(model, prompt, ids[x])) == answer["content"]
    total, count = slow_loss(model, [encoder.whole(row) for row in rows])
    assert figures["accuracy"] == right / 8
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_mode_of_the_model_stays(model: Any, encoder: Encoder):
    rows = parsed(tiny_chat.chats(3))
    expected = measure(model, rows, encoder, ALL, 0)
    model.train()
    try:
        assert measure(model, rows, encoder, ALL, 0) == expected
        assert model.training
    finally:
        model.eval()


def test_pairs_keep_the_space_before_their_answer(model: Any, encoder: Encoder):
    rows = parsed([{"prompt": "q:", "completion": " yes"}, {"prompt": "r:", "completion": " no"}], "prompt_completion")
    right = 0
    for row in rows:
        prompt = encoder.tokenizer(row.prompt)["input_ids"]
        scores = {}
        for label in tiny_chat.LABELS:
            ids = [*encoder.tokenizer(f"{row.prompt} {label}")["input_ids"], encoder.tokenizer.eos_token_id]
            scores[label] = without_end(model, prompt, ids)
        right += min(scores, key=lambda label: scores[label]) == row.completion.strip()
    assert measure(model, rows, encoder, Evaluation(labels=tiny_chat.LABELS), 0)["accuracy"] == right / 2


@pytest.mark.parametrize(
    ("rows", "kind", "evaluation", "message"),
    [
        ([{"text": "hello"}], "text", Evaluation(labels=["a", "b"]), "rows.jsonl:1: plain text has no answer"),
        ([{"text": "hello"}], "text", Evaluation(metrics=["exact_match"]), "rows.jsonl:1: plain text has no answer"),
        (tiny_chat.chats(2), "messages", Evaluation(labels=["a", "b"]), "rows.jsonl:1: the answer `.*` is none of"),
        ([], "messages", Evaluation(), "no row is left to evaluate"),
    ],
)
def test_rows_that_cannot_be_measured(
    rows: list[Any], kind: str, evaluation: Evaluation, message: str, model: Any, encoder: Encoder
):
    with pytest.raises(DataError, match=message):
        measure(model, parsed(rows, kind), encoder, evaluation, 0)


def test_labels_that_do_not_fit_are_not_compared(model: Any):
    short = Encoder(tiny_chat.tokenizer(), tiny_chat.TEMPLATE, 13, "truncate")
    rows = parsed([{"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "no"}]}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: too long to compare its labels"):
        measure(model, rows, short, Evaluation(labels=["no", "a much longer label"]), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["a", "a"]}, "twice"),
        ({"labels": ["a"]}, "nothing to choose"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Evaluation(**fields)


@pytest.mark.parametrize(
    ("fields", "task", "keys", "message"),
    [
        ({"metrics": ["accuracy"]}, SFT(), ("metrics",), "accuracy needs the possible answers"),
        ({"gates": {"hard/accuracy": Gate(min=0.5)}}, SFT(), ("gates", "hard/accuracy"), "accuracy needs the possible"),
        ({"metrics": ["loss", "preference_margin"]}, Seq2Seq(), ("metrics",), "is not measured of `seq2seq`"),
    ],
)
def test_what_a_task_cannot_be_measured_by(fields: dict[str, Any], task: Task, keys: tuple[str, ...], message: str):
    [(at, text, hint)] = Evaluation(**fields).unmeasurable(task)
    assert at == keys
    assert message in text
    assert hint
    assert not list(Evaluation(labels=["a", "b"], **fields).unmeasurable(SFT()))


def test_labels_and_gates_ask_for_their_metrics():
    def names(evaluation: Evaluation) -> list[str]:
        return [metric.name for metric in evaluation.wanted]

    assert names(Evaluation(labels=["a", "b"]).of(SFT())) == ["loss", "perplexity", "accuracy"]
    assert names(Evaluation().of(DPO())) == ["preference_accuracy", "preference_margin"]
    assert names(Evaluation(metrics=["accuracy"], labels=["a", "b"])) == ["accuracy"]
    assert names(Evaluation(metrics=["loss"], gates={"hard/bleu": Gate(min=1.0)})) == ["loss", "bleu"]


def test_only_what_is_asked_for_is_computed(model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    rows = parsed(tiny_chat.chats(4))
    monkeypatch.setattr(model, "generate", None)
    seen = seen_by(model, SFT(), rows, encoder, Evaluation(metrics=["accuracy"], labels=tiny_chat.LABELS), 0)
    assert len(seen.choice) == 4
    assert len(seen.nats) == 0
    assert seen.said == [None] * 4
    seen = seen_by(model, SFT(), rows, encoder, Evaluation(metrics=["loss"]), 0)
    assert (len(seen.choice), len(seen.nats)) == (0, 4)
    monkeypatch.undo()
    monkeypatch.setattr(model, "forward", None)
    monkeypatch.setattr("peftctl.evaluation.measure.score", None)
    monkeypatch.setattr("peftctl.evaluation.measure.generate", lambda *a: ["  x "] * len(a[1]))
    seen = seen_by(model, SFT(), rows, encoder, Evaluation(metrics=["exact_match"]), 0)
    assert seen.said == ["x"] * 4


def test_samples_are_generated_for_the_first_rows_alone(model: Any, encoder: Encoder):
    rows = parsed(tiny_chat.chats(5))
    few = seen_by(model, SFT(), rows, encoder, Evaluation(metrics=["loss"], samples=2, max_new_tokens=4), 0).said
    every = seen_by(model, SFT(), rows, encoder, Evaluation(metrics=["exact_match"], max_new_tokens=4), 0).said
    assert few == [*every[:2], None, None, None]


@torch.no_grad()
def test_token_accuracy_is_teacher_forced(model: Any, encoder: Encoder):
    rows = parsed(tiny_chat.chats(9))
    right = count = 0
    for row in rows:
        encoded = encoder.whole(row)
        best = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].argmax(-1)
        for position, label in enumerate(encoded.labels):
            if label != -100:
                right, count = right + int(best[position - 1] == label), count + 1
    assert measure(model, rows, encoder, Evaluation(metrics=["token_accuracy"]), 0)["token_accuracy"] == right / count


def test_confusion_has_answers_as_rows_and_choices_as_columns(model: Any, encoder: Encoder):
    rows = parsed(tiny_chat.chats(11))
    seen = seen_by(model, SFT(), rows, encoder, Evaluation(metrics=["confusion"], labels=tiny_chat.LABELS), 0)
    table = confusion(seen)
    for i, label in enumerate(tiny_chat.LABELS):
        assert sum(table[i]) == sum(answer_of(row) == label for row in rows)
        assert sum(line[i] for line in table) == list(seen.choice).count(i)
    assert len(seen.nats) == 0


def test_pieces_of_a_split_row_count_as_one_row(model: Any):
    split = Encoder(tiny_chat.tokenizer(), tiny_chat.TEMPLATE, 5, "split")
    rows = parsed([{"text": "a longer text"}, {"text": "b"}], "text")
    seen = seen_by(model, SFT(), rows, split, Evaluation(metrics=["loss"]), 0)
    pieces = [split.encode(row) for row in rows]
    assert len(pieces[0]) > 1
    assert seen.tokens.tolist() == [sum(piece.trained for piece in row) for row in pieces]
    assert seen.nats[0] == pytest.approx(slow_loss(model, pieces[0])[0], rel=1e-5)
