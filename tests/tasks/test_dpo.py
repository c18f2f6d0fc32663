"""Pairs of answers: losses and rewards are TRL's, the reference is where training started, runs prefer the better."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_chat
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peftctl
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.formats import Pair, Preference
from peftctl.engine.attach import adapters_of, attach, methods
from peftctl.engine.disk import load, save
from peftctl.errors import DataError, RecipeError
from peftctl.methods import METHODS
from peftctl.models import base as models
from peftctl.tasks.dpo import DPO
from peftctl.tasks.orpo import ORPO, log_odds
from peftctl.tasks.preference import Preferring, parted, scores
from peftctl.tasks.simpo import SimPO
from peftctl.tasks.task import REFERENCE
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_base(tmp_path_factory.mktemp("model") / "tiny-llama")


def texts(number: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{'ab' * (i % 3)}{chr(97 + i)}? ", "chosen": "yes" + "!" * (i % 4), "rejected": "n" + "o" * (i % 5)}
        for i in range(number)
    ]


def chats(number: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in texts(number)
    ]


def encoded(rows: list[dict[str, Any]], **settings: Any) -> list[Encoded]:
    chat = isinstance(rows[0]["prompt"], list)
    template = tiny_chat.TEMPLATE if chat else None
    encoder = DPO().reading.encoder(Dataset(train="rows.jsonl", **settings), tiny_chat.tokenizer(), template)
    made = [encoder.encode(Preference(f"rows.jsonl:{n}", **row)) for n, row in enumerate(rows, 1)]
    return [piece for pieces in made for piece in pieces]


def stirred(base: Path) -> Any:
    """The base with a LoRA that changes what it says."""
    model = models.load(models.Model(name_or_path=str(base), dtype="float32", device="cpu")).model
    attach(model, METHODS["lora"](**LORA))
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters_of(model, "default").values():
        for parameter in adapter.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("rows", [texts(6), chats(6)], ids=["texts", "chats"])
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
def test_losses_and_rewards_are_those_of_trl(
    base: Path, tmp_path: Path, task: DPO, theirs: dict[str, Any], rows: list[dict[str, Any]]
):
    from datasets import Dataset as Rows
    from trl import DPOConfig, DPOTrainer

    model = stirred(base)
    save(model, tmp_path / "adapter")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=LORA["target_modules"], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    where = {"output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "report_to": []}
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=DPOConfig(**where, **theirs),
        train_dataset=Rows.from_list(rows),
        processing_class=tiny_chat.tokenizer(),
        peft_config=settings,
    )
    peft.set_peft_model_state_dict(trainer.model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    loss = float(trainer.compute_loss(trainer.model.train(), batch))
    told = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    ours = {name: float(total) / len(rows) for name, total in task.sums(model, task.collate(encoded(rows), 0)).items()}
    assert ours["loss"] == pytest.approx(loss, abs=1e-4)
    assert ours["chosen_reward"] == pytest.approx(told["rewards/chosen"], abs=1e-4)
    assert ours["rejected_reward"] == pytest.approx(told["rewards/rejected"], abs=1e-4)
    assert ours["reward_margin"] == pytest.approx(told["rewards/margins"], abs=1e-4)
    assert ours["reward_accuracy"] == pytest.approx(told["rewards/accuracies"], abs=1e-4)
    assert abs(ours["reward_margin"]) > 0.01


def test_smoothed_labels_are_a_mixture_of_both_orders(base: Path):
    model, rows = stirred(base), texts(4)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    right, wrong = (DPO().loss(model, DPO().collate(encoded(each), 0)) for each in (rows, swapped))
    smoothed = DPO(label_smoothing=0.3).loss(model, DPO().collate(encoded(rows), 0))
    torch.testing.assert_close(smoothed, 0.7 * right + 0.3 * wrong)


def test_odds_and_margins_are_those_of_trl(base: Path):
    """ORPO's odds ratio and SimPO's loss by TRL's own functions; the rest of ORPO is the loss of the better answer."""
    from types import SimpleNamespace

    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    model, rows = stirred(base), encoded(texts(6))
    policy = scores(model, ORPO().collate(rows, 0))
    better, worse = policy.mean.chunk(2)
    gone = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(gone, better, worse)[0]
    torch.testing.assert_close(ORPO(beta=0.25).losses(policy), -better - theirs, rtol=1e-4, atol=1e-5)
    simple = {"loss_type": "simpo", "simpo_gamma": 1.5, "beta": 2.5, "label_smoothing": 0.0, "alpha": 0.0}
    gone = SimpleNamespace(**simple, accelerator=SimpleNamespace(device="cpu"))
    theirs = CPOTrainer.cpo_loss(gone, better, worse)[0]
    torch.testing.assert_close(SimPO(beta=2.5, gamma=1.5).losses(policy), theirs, rtol=1e-4, atol=1e-5)


def test_odds_of_what_is_certain_are_finite():
    assert math.isfinite(float(log_odds(torch.tensor(0.0))))
    torch.testing.assert_close(log_odds(torch.tensor([0.25, 0.9]).log()), torch.tensor([1 / 3, 9.0]).log())


@pytest.mark.parametrize("task", [DPO(), ORPO(), SimPO()], ids=["dpo", "orpo", "simpo"])
def test_neither_padding_nor_company_changes_a_pair(base: Path, task: Preferring):
    model, rows = stirred(base), encoded(chats(5))
    together = task.sums(model, task.collate(rows, 0))
    alone = [task.sums(model, task.collate([row], 0)) for row in rows]
    for name, total in together.items():
        torch.testing.assert_close(total, sum(each[name] for each in alone), rtol=1e-4, atol=1e-5)
    nothing = task.sums(model, task.collate([], 0))
    assert nothing.keys() == together.keys()
    assert all(float(total) == 0 for total in nothing.values())
    nothing["loss"].backward()


def test_a_row_holds_both_sequences():
    first, second = parted(encoded(texts(2))[1])
    words = tiny_chat.tokenizer()
    assert [words.decode(each.input_ids) for each in (first, second)] == ["abb? yes!<eos>", "abb? no<eos>"]
    assert [each.trained for each in (first, second)] == [5, 3]
    [talk] = encoded([{"prompt": [], "chosen": two_turns("b"), "rejected": two_turns("c")}])
    assert [len(part.spans) for part in parted(talk)] == [2, 2]


def two_turns(said: str) -> list[dict[str, str]]:
    turns = ["assistant", "user", "assistant"]
    return [{"role": role, "content": said} for role in turns]


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


@pytest.mark.parametrize("task", ["dpo", "orpo", "simpo", {"type": "dpo", "variant": "ipo", "beta": 0.2}], ids=str)
def test_it_prefers_the_better_answer_to_rows_it_has_not_seen(recipe: Callable[..., Any], task: Any):
    run = peftctl.train(recipe(task, learning_rate=2e-2))["path"]
    record = evaluate(run)
    base, tuned = record["figures"]["base"], record["figures"]["adapter"]
    assert tuned["preference_accuracy"] > max(base["preference_accuracy"], 0.9)
    assert tuned["preference_margin"] > base["preference_margin"]


METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "alpha": 16},
    "dora": {"r": 4, "alpha": 8},
    "adalora": {"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1},
    "ia3": {},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "bottleneck": {},
    "vera": {"r": 8},
}


@pytest.mark.parametrize("kind", METHOD_SETTINGS)
def test_after_sft_the_reference_is_the_adapter_it_starts_from(recipe: Callable[..., Any], kind: str, tmp_path: Path):
    method = {"type": kind, **METHOD_SETTINGS[kind]}

    def of(task: str, **more: Any) -> Any:
        return {
            **recipe(task, train=more.pop("train", "pairs.jsonl"), learning_rate=1e-2, **more.pop("trainer", {})),
            **more,
        }

    first = peftctl.train({**of("sft", train="sft.jsonl"), "method": method}, output=tmp_path / "sft")
    start = {**method, "init_from": first["adapter"]}
    if kind == "adalora":
        start |= {"init_r": 6}
    heard: list[dict[str, Any]] = []
    run = peftctl.train({**of("dpo"), "method": start}, output=tmp_path / "dpo", listen=heard.append)["path"]
    step = next(event for event in heard if event["event"] == "step")
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert step["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert sorted(load_file(f"{run}/adapter/adapter_model.safetensors")) == sorted(
        load_file(f"{first['adapter']}/adapter_model.safetensors")
    )
    again = tmp_path / "again"
    stopped = {**of("dpo", trainer={"steps": 20}), "method": start}
    shutil.copytree(run, again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / "step-000020")
    peftctl.train(stopped, output=again, resume=True)
    one, other = (load_file(f"{path}/adapter/adapter_model.safetensors") for path in (run, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_reference_stays_as_it_was(recipe: Callable[..., Any], tmp_path: Path, base: Path):
    """Rewards that are told in the last step are those of the trained adapter against the one it started from."""
    first = peftctl.train(recipe("sft", train="sft.jsonl", learning_rate=1e-2), output=tmp_path / "sft")["adapter"]
    heard: list[dict[str, Any]] = []
    settings = recipe("dpo", {"init_from": first}, learning_rate=1e-2, eval_every=20)
    run = peftctl.train(settings, output=tmp_path / "dpo", listen=heard.append)["path"]
    told = [event for event in heard if event["event"] == "eval"][-1]
    model: Any = models.load(models.Model(name_or_path=str(base), dtype="float32", device="cpu")).model
    load(model, first, REFERENCE)
    load(model, f"{run}/adapter")
    assert set(methods(model)) == {REFERENCE, "default"}
    rows = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    sums = DPO().sums(model.eval(), DPO().collate(encoded(rows), 0))
    assert told["loss"] == pytest.approx(float(sums["loss"]) / len(rows), abs=1e-4)
    assert told["reward_margin"] == pytest.approx(float(sums["reward_margin"]) / len(rows), abs=1e-4)


def test_micro_batches_change_nothing(recipe: Callable[..., Any], tmp_path: Path):
    one = peftctl.train(recipe("dpo", {"dropout": 0.0}, learning_rate=1e-2), output=tmp_path / "one")
    other = peftctl.train(
        recipe("dpo", {"dropout": 0.0}, learning_rate=1e-2, micro_batch_size=8), output=tmp_path / "other"
    )
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-4)


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
