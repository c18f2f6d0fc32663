"""VeRA against HF PEFT: the same random matrices, and folders that cross both ways."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from methods.oracle import TASKS, assert_same, peft_reads_ours, we_read_peft, written_back
from tiny import build, stir

import peftctl
from peftctl.engine.attach import adapters_of

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "intermediate.dense"],
}
# our fields; PEFT's are the same but for `dropout`
VARIANTS = {
    "plain": {},
    "from the seed": {"save_projection": False, "projection_prng_key": 5},
    "own biases": {"bias": "vera_only"},
    "all biases": {"bias": "all"},
    "all linears": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
}
CASES = [(name, variant) for name in TARGETS for variant in VARIANTS]
HEADS = {"bert": {"modules_to_save": ["classifier"]}}
"""What PEFT trains of every sequence classifier."""


@pytest.fixture(autouse=True)
def _what_peft_says_of_seeds():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A")
        yield


def fields(name: str, variant: str) -> dict:
    return {"r": 8, "target_modules": TARGETS[name]} | VARIANTS[variant]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_peft_reads_what_we_save(name, variant, tmp_path):
    peft_reads_ours(name, "vera", fields(name, variant) | HEADS.get(name, {}), tmp_path)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_we_read_what_peft_saves(name, variant, tmp_path):
    config = peft.VeraConfig(**fields(name, variant), vera_dropout=0.1, task_type=TASKS[name])
    ours = we_read_peft(name, config, tmp_path / "theirs")
    described = frozenset({"layers_to_transform", "modules_to_save"})  # by the exact names of the modules there are
    if (name, variant) != ("bert", "all biases"):  # PEFT repeats the biases of the head under other names
        written_back(ours, tmp_path / "theirs", tmp_path / "ours", described)


@pytest.mark.parametrize("name", TARGETS)
def test_the_matrices_are_those_of_peft(name):
    theirs = peft.get_peft_model(
        build(name), peft.VeraConfig(r=8, projection_prng_key=11, target_modules=TARGETS[name], task_type=TASKS[name])
    )
    method = peftctl.METHODS["vera"](r=8, projection_prng_key=11, target_modules=TARGETS[name])
    ours = next(iter(adapters_of(peftctl.attach(build(name), method), "default").values())).projections
    assert torch.equal(ours.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(ours.vera_B, theirs.base_model.vera_B["default"])


def test_matrices_that_do_not_follow_from_the_seed(tmp_path):
    """A folder from a machine that draws other numbers: what it saved is what counts, here and there."""
    theirs = peft.get_peft_model(build("llama"), peft.VeraConfig(r=8, target_modules=["q_proj"]))
    stir(theirs)
    theirs.base_model.vera_A["default"].mul_(3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftctl.load(build("llama"), tmp_path / "theirs")
    assert_same(ours, theirs.eval())
    peftctl.save(ours, tmp_path / "ours")
    assert_same(ours, peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval())
