"""The loop on a tiny model: what must not matter does not, what must stop it does, and it goes on where it was."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import VOCAB, build

import peftctl
from peftctl.data.batches import Part
from peftctl.data.encode import Encoded
from peftctl.engine.attach import trained
from peftctl.errors import Interrupted, NonFiniteError
from peftctl.evaluation.loss import means
from peftctl.methods import METHODS
from peftctl.tasks.dpo import DPO
from peftctl.tasks.sft import SFT
from peftctl.training import checkpoint
from peftctl.training.loop import train
from peftctl.training.signals import Stop
from peftctl.training.trainer import Trainer, peak_rate, total_steps

BASE = Trainer(
    steps=6, batch_size=6, micro_batch_size=6, learning_rate=5e-3, warmup=0.2, weight_decay=0.01, save_every=1
)


def rows(number: int = 22, seed: int = 0) -> list[Encoded]:
    """Rows of uneven length, trained from uneven places on."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        length = 4 + index % 9
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        made.append(Encoded(array("i", ids), ((1 + index % 3, length),)))
    return made


def run(folder: Path, trainer: Trainer = BASE, *, dropout: float = 0.0, stop: Stop | None = None, **given):
    """Train a fresh tiny model; returns it, the events and where it ended."""
    model = build("llama")
    torch.manual_seed(5)
    method = peftctl.METHODS["lora"](r=4, dropout=dropout)
    peftctl.attach(model, method)
    events: list[dict] = []
    options = {
        "accelerator": Accelerator(cpu=True),
        "pad_id": 0,
        "seed": 1,
        "folder": folder,
        "stop": stop or Stop(),
        "log": events.append,
        "write_adapter": lambda path: peftctl.save(model, path),
    } | given
    progress = train(model, method, trainer, options.pop("rows", rows()), options.pop("eval_rows", {}), **options)
    return model, events, progress


def digest(model: torch.nn.Module) -> str:
    parts = (p.detach().numpy().tobytes() for _, p in sorted(trained(model).items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def losses(events: list[dict]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_do_not_change_the_result(tmp_path, micro_batch_size):
    whole, events, _ = run(tmp_path / "whole")
    split, split_events, _ = run(tmp_path / "split", replace(BASE, micro_batch_size=micro_batch_size))
    assert losses(split_events) == pytest.approx(losses(events), rel=1e-5)
    for name, parameter in trained(whole).items():
        torch.testing.assert_close(trained(split)[name], parameter, rtol=1e-3, atol=2e-5)


def test_the_loss_is_the_mean_over_trained_tokens(tmp_path):
    _, events, _ = run(tmp_path, replace(BASE, steps=1, batch_size=22))
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=4))
    total, count = 0.0, 0
    for row in rows():
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum"))
        count += row.trained
    assert losses(events)[0] == pytest.approx(total / count, rel=1e-5)
    assert events[0]["trained_tokens"] == count


@pytest.mark.parametrize("step", range(1, 5))
def test_interrupted_at_any_step_and_resumed_equals_never_interrupted(tmp_path, step):
    straight, events, _ = run(tmp_path / "straight", dropout=0.3)

    class After(Stop):
        @property
        def requested(self):
            return "SIGTERM" if (tmp_path / f"broken/step-{step:06d}").exists() else None

        @requested.setter
        def requested(self, value):
            pass

    with pytest.raises(Interrupted):
        run(tmp_path / "broken", dropout=0.3, stop=After())
    found, skipped = checkpoint.latest(tmp_path / "broken")
    assert not skipped
    resumed, more, _ = run(tmp_path / "broken", dropout=0.3, resume_from=found)
    assert digest(resumed) == digest(straight)
    assert losses(more) == losses(events)[found.step :]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_every_optimizer_learns_and_resumes(tmp_path, optimizer):
    every_row = {"batch_size": 22, "micro_batch_size": 22}  # the same rows each step, so that losses compare
    trainer = replace(BASE, optimizer=optimizer, schedule="linear", steps=8, learning_rate=1e-2, **every_row)
    straight, events, _ = run(tmp_path / "a", trainer)
    assert losses(events)[-1] < losses(events)[0]
    run(tmp_path / "b", replace(trainer, keep=9))
    resumed, _, _ = run(tmp_path / "b", trainer, resume_from=checkpoint.load(tmp_path / "b" / "step-000004"))
    assert digest(resumed) == digest(straight)


def test_warmup_and_schedule(tmp_path):
    _, events, _ = run(tmp_path, replace(BASE, steps=10, schedule="linear", warmup=0.2, learning_rate=1.0e-3))
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rates[-1] == min(rates[2:])
    assert 0 < rates[-1] < 2e-4


def test_steps_from_epochs():
    assert total_steps(Trainer(epochs=1, batch_size=16), [Part(33)]) == 3
    assert total_steps(Trainer(epochs=2.5, batch_size=16), [Part(32)]) == 5
    assert total_steps(Trainer(epochs=1, batch_size=16), [Part(32, 2.0), Part(10, 0.5)]) == 5
    assert total_steps(Trainer(steps=7, epochs=1), [Part(32)]) == 7


def test_epochs_and_steps_are_one_too_many():
    with pytest.raises(ValueError, match="both say how long"):
        Trainer(steps=7, epochs=2)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path):
    model = build("llama")
    torch.manual_seed(5)
    method = peftctl.METHODS["lora"](r=4)
    peftctl.attach(model, method)
    seen = []

    def log(event):
        seen.append(event)
        if event["event"] == "step" and event["step"] == 3:
            model.lm_head.weight.data.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match="step 4: loss nan"):
        train(
            model,
            method,
            replace(BASE, save_every=100),
            rows(),
            [],
            accelerator=Accelerator(cpu=True),
            pad_id=0,
            seed=1,
            folder=tmp_path,
            stop=Stop(),
            log=log,
            write_adapter=lambda path: peftctl.save(model, path),
        )
    found, _ = checkpoint.latest(tmp_path)
    assert found.step == 3
    assert all(p.isfinite().all() for p in trained(model).values())


def test_best_adapter_and_early_stopping(tmp_path):
    trainer = replace(BASE, steps=40, learning_rate=0.3, schedule="constant", eval_every=1, early_stopping=3, keep=2)
    model, events, progress = run(tmp_path, trainer, eval_rows={"": rows(8, seed=9)})
    evaluations = [event for event in events if event["event"] == "eval"]
    assert progress.step < 40
    assert progress.evaluations_since_best == 3
    best = min(evaluations, key=lambda event: event["loss"])
    assert progress.best_step == best["step"]
    found = checkpoint.load(checkpoint.at(tmp_path, best["step"]))  # the best one is kept
    assert found.step == best["step"]
    again = means(model, SFT(), rows(8, seed=9), 3, 0, Accelerator(cpu=True))
    assert again["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _, _ = run(tmp_path / "plain", replace(BASE, steps=3))
    again, _, _ = run(tmp_path / "again", replace(BASE, steps=3, gradient_checkpointing=True))
    for name, parameter in trained(plain).items():
        torch.testing.assert_close(trained(again)[name], parameter, rtol=1e-4, atol=1e-6)


def test_preferences_take_a_tenth_of_the_methods_rate():
    method = METHODS["lora"]()
    assert peak_rate(Trainer(), method) == method.learning_rate
    assert peak_rate(Trainer(task=DPO()), method) == pytest.approx(method.learning_rate / 10)
    assert peak_rate(Trainer(task=DPO(), learning_rate=1e-3), method) == 1e-3
