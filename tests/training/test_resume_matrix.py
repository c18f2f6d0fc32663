"""Resumed after any step, with any kind of rows and any method, a run ends with the bits of the uninterrupted one."""

from __future__ import annotations

import random
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from methods.settings import SETTINGS, made
from tiny import VOCAB, build

import peftctl
from peftctl.data.batches import Part
from peftctl.data.encode import Encoded
from peftctl.data.store import Stored, Writer
from peftctl.engine.attach import live
from peftctl.tasks.sft import SFT
from peftctl.training import checkpoint
from peftctl.training.loop import train
from peftctl.training.signals import Stop
from peftctl.training.speed import quickened
from peftctl.training.trainer import Trainer

STEPS = 8
BASE = Trainer(
    steps=STEPS, batch_size=5, micro_batch_size=5, learning_rate=1e-2, warmup=0.2, save_every=1, keep=99, eval_every=99
)
"""22 rows: an epoch ends after step 5 with a step of two."""


def rows(number: int = 22, seed: int = 0) -> list[Encoded]:
    """Rows of uneven length, trained from uneven places on."""
    draw = Random(seed)
    lengths = [4 + index % 9 for index in range(number)]
    ids = [array("i", [draw.randrange(3, VOCAB) for _ in range(length)]) for length in lengths]
    return [Encoded(one, ((1 + index % 3, len(one)),)) for index, one in enumerate(ids)]


class Transformed(SFT):
    """Every row is another one each time: a token of it is drawn anew."""

    def seen(self, rows: Sequence[Encoded], seed: int, step: int) -> Sequence[Encoded]:
        return [self.changed(row, Random(f"{seed} {step} {index}")) for index, row in enumerate(rows)]

    def changed(self, row: Encoded, draw: Random) -> Encoded:
        ids = array("i", row.ids)
        ids[draw.randrange(len(ids))] = draw.randrange(3, VOCAB)
        return replace(row, ids=ids)


def stored(folder: Path) -> Stored:
    """Rows in files, as those of a long data set are."""
    folder.mkdir()
    writer = Writer(folder)
    for row in rows():
        writer.write([row])
    writer.close()
    return Stored(folder)


@dataclass(frozen=True)
class Kind:
    """How rows come and what happens between steps."""

    trainer: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[Path], Sequence[Encoded]] = lambda folder: rows()
    fast: str = "off"


KINDS = {
    "map": Kind(),
    "stored": Kind(rows=stored),
    "accumulated": Kind({"micro_batch_size": 2}),
    "lines": Kind(given={"packing": "lines"}),
    "flat": Kind({"micro_batch_size": 2}, given={"packing": "flat"}, fast="auto"),
    "transformed": Kind({"task": Transformed()}),
    "weighted": Kind(given={"parts": [Part(12, 1.5), Part(10, 0.5)]}),
    "evaluated": Kind({"eval_every": 2}, given={"eval_rows": {"": rows(7, seed=3)}}),
    "recomputed": Kind({"gradient_checkpointing": True}),
}
LLAMAS = sorted(method for method, setting in SETTINGS.items() if "llama" in setting.zoo)
CASES = [*((method, kind) for method in ("lora", "adalora") for kind in KINDS)]
CASES += [(method, "map") for method in LLAMAS if method not in ("lora", "adalora")]


@dataclass
class Trial:
    """Runs of one method on rows of one kind."""

    method: str
    kind: Kind
    folder: Path
    keep: int = 99

    def run(self, resume_from: checkpoint.Checkpoint | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
        """What was trained at the end, and the losses on the way."""
        begun = resume_from.step if resume_from else 0
        torch.manual_seed(5)
        model, method = build("llama"), made(self.method, "llama")
        if hasattr(method, "dropout") and self.method != "delta_lora":  # which refuses it
            method = replace(method, dropout=0.3)
        trainer = replace(BASE, fast=self.kind.fast, keep=self.keep, **self.kind.trainer)
        peftctl.attach(model, method)
        random.seed(begun)  # nothing may depend on what was drawn before
        torch.manual_seed(begun)
        losses: list[float] = []
        options: dict[str, Any] = {"eval_rows": {}, "folder": self.folder / f"from-{begun}", **self.kind.given}
        with quickened(trainer, model, print):
            train(
                model,
                method,
                trainer,
                self.rows,
                options.pop("eval_rows"),
                accelerator=Accelerator(cpu=True),
                pad_id=0,
                seed=1,
                stop=Stop(),
                log=lambda event: losses.append(event["loss"]) if event["event"] == "step" else None,
                write_adapter=lambda path: peftctl.save(model, path),
                resume_from=resume_from,
                **options,
            )
        return {name: tensor.detach().clone() for name, tensor in live(model).items()}, losses

    def __post_init__(self) -> None:
        self.rows = self.kind.rows(self.folder / "rows")

    def inexact(self, steps: Sequence[int]) -> list[int]:
        """The steps after which a resumed run does not end as the uninterrupted one."""
        expected, losses = self.run()
        found = []
        for step in steps:
            own = shutil.copytree(self.folder / "from-0", self.folder / f"from-{step}")
            tensors, more = self.run(checkpoint.load(checkpoint.at(own, step)))
            same = tensors.keys() == expected.keys() and all(torch.equal(tensors[k], expected[k]) for k in expected)
            if not same or more != losses[step:]:
                found.append(step)
        return found


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_other_step(method: str, kind: str, tmp_path: Path):
    assert Trial(method, KINDS[kind], tmp_path).inexact([3, 5]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_step(method: str, kind: str, tmp_path: Path):
    assert Trial(method, KINDS[kind], tmp_path).inexact(range(1, STEPS + 1)) == []


def test_the_matrix_is_large():
    assert len(CASES) * STEPS >= 240


@pytest.mark.parametrize("what", ["rng", "optimizer", "schedule"])
def test_what_is_not_restored_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trial = Trial("lora", KINDS["map"], tmp_path)
    if what == "rng":
        monkeypatch.setattr(checkpoint.Checkpoint, "restore_rng", lambda self, rank=0: True)
    elif what == "optimizer":
        monkeypatch.setattr(checkpoint.snapshot, "restore_optimizer", lambda *given: None)
    else:
        own = checkpoint.restore
        monkeypatch.setattr(checkpoint, "restore", lambda *given: own(*given[:-1], None))
    assert trial.inexact([3, 6]) == [3, 6]
