"""A run that packs computes what it computes with padding, and packs where that is possible and worth it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import VOCAB, build

import peftctl
from peftctl.data.batches import Layout, Part
from peftctl.data.encode import Encoded
from peftctl.engine.attach import trained
from peftctl.errors import Interrupted, RecipeError
from peftctl.training import checkpoint
from peftctl.training.loop import train
from peftctl.training.packing import choose, work
from peftctl.training.signals import Stop
from peftctl.training.trainer import Trainer
from peftctl.verbs.mortal import one_thread

BASE = Trainer(steps=6, batch_size=8, micro_batch_size=2, learning_rate=5e-3, save_every=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def rows(lengths: list[int] | None = None) -> list[Encoded]:
    """Rows trained from uneven places on; a few long ones among short ones unless told otherwise."""
    draw = torch.Generator().manual_seed(0)
    lengths = lengths or [30 if i % 7 == 0 else 3 + i % 6 for i in range(21)]
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        made.append(Encoded(array("i", ids), ((1 + index % 2, length),)))
    return made


def run(folder: Any, packing: Any, trainer: Trainer = BASE, **given: Any) -> tuple[Any, list[dict[str, Any]]]:
    model = build("llama")
    torch.manual_seed(5)
    method = peftctl.METHODS["lora"](r=4, dropout=given.pop("dropout", 0.0))
    peftctl.attach(model, method)
    events: list[dict[str, Any]] = []
    options = {
        "accelerator": Accelerator(cpu=True),
        "pad_id": 0,
        "seed": 1,
        "folder": folder,
        "stop": Stop(),
        "log": events.append,
        "write_adapter": lambda path: peftctl.save(model, path),
        "packing": packing,
    }
    train(model, method, trainer, rows(), {}, **options | given)
    return model, [event for event in events if event["event"] == "step"]


@pytest.mark.parametrize("packing", ["lines", "flat"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"micro_batch_size": 5}], ids=str)
def test_packed_steps_have_the_losses_of_padded_ones(tmp_path, packing, changes):
    padded, expected = run(tmp_path / "padded", None)
    packed, found = run(tmp_path / "packed", packing, replace(BASE, **changes))
    for key in ("loss", "gradient_norm"):
        assert [step[key] for step in found] == pytest.approx([step[key] for step in expected], rel=1e-5)
    for key in ("tokens", "trained_tokens", "epoch"):
        assert [step[key] for step in found] == [step[key] for step in expected]
    for name, parameter in trained(padded).items():
        torch.testing.assert_close(trained(packed)[name], parameter, rtol=1e-3, atol=2e-5)


def test_interrupted_and_resumed_equals_never_interrupted(tmp_path):
    straight, _ = run(tmp_path / "straight", "lines", dropout=0.3)

    class After(Stop):
        requested = property(lambda self: "SIGTERM" if (tmp_path / "broken/step-000004").exists() else None)

        @requested.setter
        def requested(self, value):
            pass

    with pytest.raises(Interrupted):
        run(tmp_path / "broken", "lines", dropout=0.3, stop=After())
    found, _ = checkpoint.latest(tmp_path / "broken")
    resumed, _ = run(tmp_path / "broken", "lines", dropout=0.3, resume_from=found)
    for name, parameter in trained(straight).items():
        assert torch.equal(trained(resumed)[name], parameter), name


def chosen(packing: str, data: list[Encoded], method: str = "lora", attention: str = "sdpa") -> tuple[Any, list[str]]:
    model = build("llama")
    options: dict[str, Any] = {"num_virtual_tokens": 2} if method == "prompt" else {}
    peftctl.attach(model, peftctl.METHODS[method](**options))
    model.config._attn_implementation = attention
    said: list[str] = []
    return choose(
        replace(BASE, micro_batch_size=4, packing=packing), model, data, [Part(len(data))], 0, said.append
    ), said


def test_auto_packs_where_it_saves_work():
    assert chosen("auto", rows()) == ("lines", [])
    assert chosen("auto", rows([9] * 20)) == (None, []), "nothing is padded"
    assert chosen("off", rows()) == (None, [])
    assert chosen("on", rows([9] * 20)) == ("lines", [])


def test_auto_says_once_why_rows_that_would_gain_are_padded():
    packing, said = chosen("auto", rows(), "prompt")
    assert packing is None
    assert said == ["rows are padded, not packed: `prompt` acts on whole lines, not on the rows in them"]
    assert chosen("auto", rows([9] * 20), "prompt") == (None, []), "nobody misses it"


def test_on_is_an_error_where_it_cannot_be():
    with pytest.raises(RecipeError, match=r"trainer\.packing: `prompt` acts on whole lines.*set `packing: auto`"):
        chosen("on", rows(), "prompt")


def test_flash_attention_gets_rows_in_one_line_without_padding(monkeypatch):
    monkeypatch.setattr("peftctl.training.packing.obstacle", lambda model, packing: None)  # it needs a GPU
    assert chosen("auto", rows([9] * 20), attention="flash_attention_2") == ("flat", [])


def test_work_counts_padding_and_the_square_of_the_lines():
    model, data = build("llama"), rows([30, 6, 6, 6, 6, 6])  # width 32: the linears of one token are 6 * 32
    steps = [[0, 1, 2, 3, 4, 5]]
    assert work(model, Layout(data, 2, 0), steps) == pytest.approx(2 * 30 * (1 + 30 / 192) + 2 * 2 * 6 * (1 + 6 / 192))
    assert work(model, Layout(data, 2, 0, "lines"), steps) == pytest.approx(2 * 30 * (1 + 30 / 192))
