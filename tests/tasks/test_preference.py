"""Pairs of answers without a reference: ORPO and SimPO are what TRL's trainers compute of the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_preferences as tiny
import torch

from peftctl.tasks.dpo import DPO
from peftctl.tasks.orpo import ORPO, log_odds
from peftctl.tasks.preference import Preferring, parted
from peftctl.tasks.simpo import SimPO

REWARDS = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_base(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(params=[tiny.texts(6), tiny.chats(6)], ids=["texts", "chats"])
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = request.param
    return found


def theirs(trainer: type, config: type, folder: Path, base: Path, rows: Any, **settings: Any) -> dict[str, float]:
    """What a trainer of TRL says of all rows in one batch, with the LoRA of `tiny.stirred`."""
    from datasets import Dataset

    words = tiny_chat.tokenizer()
    if not isinstance(rows[0]["prompt"], list):
        words.bos_token = None  # these trainers put it before every text, whatever the tokenizer does
    where = {"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "report_to": []}
    made = trainer(
        model=tiny.trained_by_peft(base),
        args=config(**where, max_length=64, disable_dropout=False, remove_unused_columns=False, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )
    tiny.copied(tiny.stirred(base), made.model, folder / "adapter")
    batch = made.data_collator([made.train_dataset[i] for i in range(len(rows))])
    loss, told = made.get_batch_loss_metrics(made.model, batch)
    return {"loss": float(loss.detach()), **{name: float(value) for name, value in told.items()}}


def ours(task: Preferring, base: Path, rows: Any) -> dict[str, float]:
    """The means of the same rows."""
    sums = task.sums(tiny.stirred(base), task.collate(tiny.encoded(rows, task.reading), 0))
    return {name: float(total.detach()) / len(rows) for name, total in sums.items()}


def same_rewards(found: Mapping[str, float], told: Mapping[str, float]) -> None:
    for name, key in REWARDS.items():
        assert found[name] == pytest.approx(told[key], abs=1e-4), name


def test_simpo_is_that_of_trl(base: Path, tmp_path: Path, rows: list[dict[str, Any]]):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.5, "beta": 2.5}
    told = theirs(CPOTrainer, CPOConfig, tmp_path, base, rows, **settings)
    found = ours(SimPO(beta=2.5, gamma=1.5), base, rows)
    assert found["loss"] == pytest.approx(told["loss"], abs=1e-4)
    same_rewards(found, told)


def test_orpo_is_that_of_trl_but_for_the_prompts_that_trl_trains(
    base: Path, tmp_path: Path, rows: list[dict[str, Any]]
):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    told = theirs(ORPOTrainer, ORPOConfig, tmp_path, base, rows, beta=0.25)
    found = ours(ORPO(beta=0.25), base, rows)
    of_answers = -found["chosen_reward"] / 0.25  # the mean of each better answer, as in the paper
    assert found["loss"] - of_answers == pytest.approx(told["loss"] - told["nll_loss"], abs=1e-4)
    assert of_answers != pytest.approx(told["nll_loss"], abs=1e-2)
    same_rewards(found, told)


def test_odds_of_what_is_certain_are_finite():
    logp = torch.tensor(0.0, requires_grad=True)
    log_odds(logp).backward()
    assert math.isfinite(float(log_odds(logp)))
    assert math.isfinite(float(logp.grad or 0.0))
    torch.testing.assert_close(log_odds(torch.tensor([0.25, 0.9]).log()), torch.tensor([1 / 3, 9.0]).log())


@pytest.mark.parametrize("task", [DPO(), ORPO(), SimPO()], ids=["dpo", "orpo", "simpo"])
def test_neither_padding_nor_company_changes_a_pair(base: Path, task: Preferring):
    model, pairs = tiny.stirred(base), tiny.encoded(tiny.chats(5), task.reading)
    together = task.sums(model, task.collate(pairs, 0))
    alone = [task.sums(model, task.collate([pair], 0)) for pair in pairs]
    for name, total in together.items():
        torch.testing.assert_close(total, sum(each[name] for each in alone), rtol=1e-4, atol=1e-5)
    nothing = task.sums(model, task.collate([], 0))
    assert nothing.keys() == together.keys()
    assert all(float(total.detach()) == 0 for total in nothing.values())
    nothing["loss"].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.requires_grad)


def two_turns(said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": said} for role in ("assistant", "user", "assistant")]


def test_a_row_holds_both_sequences():
    first, second = parted(tiny.encoded(tiny.texts(2), DPO().reading)[1])
    words = tiny_chat.tokenizer()
    assert [words.decode(each.input_ids) for each in (first, second)] == ["abb? yes!<eos>", "abb? no<eos>"]
    assert [each.trained for each in (first, second)] == [5, 3]
    shown, said = DPO().legible(tiny.encoded(tiny.texts(2), DPO().reading)[1])
    assert (shown.trained, said) == (8, f"the better answer, from token {len(first) + 1} the worse one")


def test_of_longer_answers_every_turn_counts_or_the_last():
    talk = [{"prompt": [], "chosen": two_turns("b"), "rejected": two_turns("c")}]
    for train_on, turns in (("assistant", 2), ("last", 1)):
        [row] = tiny.encoded(talk, DPO().reading, train_on=train_on)
        assert [len(part.spans) for part in parted(row)] == [turns, turns]
