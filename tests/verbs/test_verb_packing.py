"""`trainer.packing` as a user meets it: on, off, where it cannot be, in two processes, on a 4-bit base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from safetensors.torch import load_file
from verbs.test_verb_processes import compare, launched, torchrun

import peftctl
from peftctl.config.write import to_yaml

PACKED = {"packing": "on", "batch_size": 8, "micro_batch_size": 2}
EVEN = {"dropout": 0.0}  # dropout draws other numbers where rows lie elsewhere


def losses(run: Path) -> list[float]:
    return [step["loss"] for step in tiny_chat.steps(run)]


def test_packing_changes_no_loss_and_no_weight(made: Callable[..., Any], tmp_path: Path):
    for packing in ("on", "off"):
        peftctl.train(made(method=EVEN, trainer=PACKED | {"packing": packing}), output=tmp_path / packing)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)
    on, off = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("on", "off"))
    for name in off:
        torch.testing.assert_close(on[name], off[name], rtol=1e-3, atol=2e-5)


def test_two_processes_train_what_one_does(made: Callable[..., Any], tmp_path: Path):
    recipe = made(method=EVEN, trainer=PACKED)
    peftctl.train(recipe, output=tmp_path / "alone")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    code, _, err = launched(torchrun(), tmp_path)
    assert code == 0, err
    assert ", packed" in err
    compare(tmp_path / "alone", tmp_path / "run")


def test_the_plan_says_that_rows_are_packed(recipe_file: Callable[..., Path], cli: Callable[..., Any]):
    said = cli("train", recipe_file(trainer=PACKED), "--dry-run")
    assert said.code == 0
    assert "steps of 8 rows, packed" in said.err
    said = cli("train", recipe_file(trainer=PACKED), "trainer.packing=off", "--dry-run")
    assert "packed" not in said.err


def test_where_it_cannot_be_on_is_an_error_and_nothing_is_written(
    recipe_file: Callable[..., Path], cli: Callable[..., Any], tmp_path: Path
):
    long = {"messages": [{"role": "user", "content": "x" * 70}, {"role": "assistant", "content": "yes"}]}
    data = tiny_chat.write_rows(tmp_path / "rows.jsonl", [*tiny_chat.chats(11), long])
    prompt = {"type": "prompt", "num_virtual_tokens": 3}
    path = recipe_file(method=prompt, dataset={"train": str(data)}, trainer=PACKED)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith(REST)))
    said = cli("train", path, "--output", tmp_path / "out")
    assert said.code == 1
    assert "trainer.packing: `prompt` acts on whole lines, not on the rows in them" in said.err
    assert "hint: set `packing: auto`" in said.err
    assert not (tmp_path / "out").exists()
    said = cli("train", path, "trainer.packing=auto", *WASTEFUL, "--output", tmp_path / "out")
    assert said.code == 0
    assert said.err.count("rows are padded, not packed: `prompt` acts on whole lines") == 1


WASTEFUL = ("trainer.batch_size=12", "trainer.micro_batch_size=12")
"""All rows of a step in one batch, eleven of them padded to the length of the twelfth."""

REST = ("  r:", "  alpha:", "  dropout:", "  target_modules:")
"""Fields of the method that the recipe of these tests has for LoRA."""


def test_a_four_bit_base_packs(made: Callable[..., Any], tmp_path: Path):
    quantised = {"quantization": "nf4"}
    for packing in ("on", "off"):
        recipe = made(model=quantised, method=EVEN, trainer=PACKED | {"packing": packing})
        peftctl.train(recipe, output=tmp_path / packing)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
