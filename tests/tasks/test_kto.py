"""Answers that were judged: losses and rewards are TRL's, every row has an answer to another prompt to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_preferences as tiny
from accelerate import Accelerator

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
