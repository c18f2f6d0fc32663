"""Answers that were judged: losses and rewards are TRL's, every row has an answer to another prompt to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_preferences as tiny
from accelerate import Accelerator

from peftctl.errors import DataError
from peftctl.evaluation.loss import means
from peftctl.tasks.kto import KTO, Mismatched


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_base(tmp_path_factory.mktemp("model") / "tiny-llama")


def prepared(rows: list[dict[str, Any]], **settings: Any) -> Mismatched:
    made = tiny.encoded(rows, KTO().reading, **settings)
    return Mismatched(made, max(map(len, made)))


def told(task: KTO, model: Any, rows: Any, size: int = 100) -> dict[str, float]:
    return means(model, task, rows, size, 0, Accelerator(cpu=True))


@pytest.mark.parametrize("rows", [tiny.texts(7), tiny.chats(7)], ids=["texts", "chats"])
@pytest.mark.parametrize("seed", [0, 3])
def test_losses_and_rewards_are_those_of_trl(base: Path, tmp_path: Path, rows: list[dict[str, Any]], seed: int):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    given, model = tiny.feedback(rows), tiny.stirred(base, seed)
    longest = prepared(given).longest
    where = {"output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "report_to": []}
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    trainer = KTOTrainer(
        model=tiny.trained_by_peft(base),
        args=KTOConfig(**where, **weights, per_device_train_batch_size=len(rows), max_length=longest),
        train_dataset=Dataset.from_list(given),
        processing_class=tiny_chat.tokenizer(),
    )
    tiny.copied(model, trainer.model, tmp_path / "adapter")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    loss = float(trainer.compute_loss(trainer.model.train(), batch).detach())
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    ours = told(KTO(**weights), model, prepared(given))
    assert ours["loss"] == pytest.approx(loss, abs=1e-4)
    for name, key in {"chosen_reward": "chosen", "rejected_reward": "rejected", "reward_margin": "margins"}.items():
        assert ours[name] == pytest.approx(theirs[f"rewards/{key}"], abs=1e-4)
    assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)


def test_neither_padding_nor_company_changes_a_row(base: Path):
    model, rows = tiny.stirred(base), prepared(tiny.feedback(tiny.chats(7)))
    task = KTO(desirable_weight=2.0)
    one = told(task, model, rows)
    for size in (1, 3):
        other = told(task, model, rows, size)
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    nothing = task.sums(model, task.collate([], 0))
    assert nothing.keys() == one.keys()
    assert all(float(total.detach()) == 0 for total in nothing.values())
    nothing["loss"].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.requires_grad)


def test_pairs_are_two_rows_which_get_other_answers_of_both_kinds():
    pairs, words = tiny.texts(3), tiny_chat.tokenizer()
    rows = prepared([{**row, "chosen": f"good{i}", "rejected": f"bad{i}"} for i, row in enumerate(pairs)])
    said = [tuple(words.decode(one.input_ids) for one in (row, row.other)) for row in (rows[i] for i in range(6))]
    prompts = [row["prompt"] for row in pairs]
    wanted = [(i, kind) for i in range(3) for kind in ("good", "bad")]
    for (own, other), (number, kind) in zip(said, wanted, strict=True):
        before = f"{'bad' if kind == 'good' else 'good'}{(number - 1) % 3}"
        assert own == f"{prompts[number]}{kind}{number}<eos>"
        assert f"{prompts[number]}{before}<eos>".startswith(other)  # cut to the longest row
    assert [row.good for row in rows[0:6]] == [True, False] * 3
    assert all(row.other.labels[: row.other.spans[0][0]] == [-100] * row.other.spans[0][0] for row in rows[0:6])
    assert max(len(row.other) for row in rows[0:6]) <= rows.longest


def test_a_person_reads_which_answers_are_good():
    rows = tiny.encoded(tiny.feedback(tiny.texts(2)), KTO().reading)
    assert [KTO().legible(row)[1] for row in rows] == ["a bad answer", "a good answer"]
    assert all(end > start for row in rows for start, end in KTO().legible(row)[0].spans)


def test_long_answers_go_whole():
    long = [{"prompt": "a? ", "chosen": "b", "rejected": "c" * 20}, {"prompt": "b? ", "chosen": "b", "rejected": "c"}]
    assert len(tiny.encoded(long, KTO().reading, max_length=10, on_long="drop")) == 2
    rows = tiny.encoded(long, KTO().reading, max_length=10)
    assert [row.truncated for row in rows] == [True, True, False, False]
    assert [(row.piece, row.cut) for row in rows] == [(0, 14), (1, 0), (0, 0), (1, 0)]  # counted once
    with pytest.raises(DataError, match="are not split"):
        tiny.encoded(long, KTO().reading, on_long="split")
    with pytest.raises(DataError, match="all answers are to one prompt"):
        prepared(long[:1])
