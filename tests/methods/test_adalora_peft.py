"""AdaLoRA against HF PEFT: folders before and after ranks were chosen, both ways, and a run side by side."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from methods.oracle import TASKS, assert_same, peft_reads_ours, we_read_peft, written_back
from tiny import ZOO, build, inputs, logits, stir
from torch import nn

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError
from peftctl.methods.adalora import AdaLoRA

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "intermediate.dense"],
}
STEPS = {"tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 6}
GUESSED = {"bert": frozenset({"modules_to_save"})}
"""Keys to which PEFT adds names of heads."""


def fields(name: str) -> dict:
    head = {"modules_to_save": ["classifier"]} if name == "bert" else {}
    return {"target_modules": TARGETS[name], "init_r": 5, "target_r": 2, **STEPS, **head}


def config(name: str, **more: object) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(**fields(name), task_type=TASKS[name], **more)


def prune(model: nn.Module, empty: int = 0, seed: int = 0) -> None:
    """Drop about half of the triplets, and all of the adapter number `empty`."""
    generator = torch.Generator().manual_seed(seed)
    for number, adapter in enumerate(a for a in adapters_of(model, "default").values() if hasattr(a, "kept")):
        adapter.kept.copy_(torch.rand(len(adapter.kept), generator=generator) > 0.5)
        if number == empty:
            adapter.kept.zero_()
        with torch.no_grad():
            adapter.drop()


@pytest.mark.parametrize("name", ZOO)
def test_before_ranks_are_chosen(name, tmp_path):
    peft_reads_ours(name, "adalora", fields(name), tmp_path / "ours")
    ours = we_read_peft(name, config(name, lora_dropout=0.1), tmp_path / "theirs")
    written_back(ours, tmp_path / "theirs", tmp_path / "back", GUESSED.get(name, frozenset()))


@pytest.mark.parametrize("biased", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_with_biases(name, biased, tmp_path):
    peft_reads_ours(name, "adalora", fields(name) | {"bias": biased}, tmp_path / "ours")
    we_read_peft(name, config(name, bias=biased), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", ZOO)
def test_peft_reads_what_is_left(name, tmp_path):
    """Also of a module that lost all of its triplets."""
    ours = peftctl.attach(build(name), AdaLoRA(**fields(name)))
    stir(ours)
    prune(ours)
    peftctl.save(ours, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert {len(left) for left in pattern.values()} == {5}
    assert len({sum(left) for left in pattern.values()}) > 1
    assert 0 in map(sum, pattern.values())
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert not torch.allclose(logits(ours), logits(build(name)), atol=1e-3)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ZOO)
def test_we_read_what_peft_left(name, tmp_path):
    """After a run of theirs, which ended in the middle of a schedule."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build(name), config(name))
    update = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-2)
    batch = inputs(theirs)
    labels = torch.tensor([0, 1]) if name == "bert" else batch.get("decoder_input_ids", batch["input_ids"]).clone()
    for step in range(1, 7):
        theirs(**batch, labels=labels).loss.backward()
        update.step()
        theirs.base_model.update_and_allocate(step)
        update.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = peftctl.load(build(name), tmp_path / "theirs").eval()
    sizes = {len(a.lora_E) for a in adapters_of(ours, "default").values() if hasattr(a, "kept")}
    assert len(sizes) > 1
    assert_same(ours, theirs)
    written_back(ours, tmp_path / "theirs", tmp_path / "ours", GUESSED.get(name, frozenset()))


def test_a_run_of_ours_is_a_run_of_theirs():
    """Same start, same rows, same optimizer: the same triplets dropped at every step, the same values left.

    In float64, because Adam makes as much of the rounding of a small gradient as of a large one.
    """
    method = AdaLoRA(**fields("llama") | {"total_step": 12, "deltaT": 2}, alpha=8)
    torch.manual_seed(0)
    ours = peftctl.attach(build("llama"), method).double()
    settings = fields("llama") | {"total_step": 12, "deltaT": 2, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(build("llama"), peft.AdaLoraConfig(**settings)).double()
    alike = {
        p: dict(theirs.named_parameters())["base_model.model." + key.replace(".adapters.default", "") + ".default"]
        for key, p in trained(ours).items()
    }
    with torch.no_grad():
        for mine, other in alike.items():
            other.copy_(mine)
    updates = [torch.optim.AdamW(part, lr=2e-2) for part in (alike.keys(), alike.values())]
    batch = inputs(ours)
    for step in range(12):
        (ours(**batch, labels=batch["input_ids"]).loss + method.penalty(ours)).backward()
        theirs(**batch, labels=batch["input_ids"]).loss.backward()  # adds the penalty itself
        for update in updates:
            update.step()
        method.after_step(ours, step, 12)
        theirs.base_model.update_and_allocate(step + 1)
        for update in updates:
            update.zero_grad()
        for mine, other in alike.items():
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
        dropped = sum(int((p == 0).sum()) for p in alike if p.shape[1] == 1)
        assert dropped == sum(int((alike[p] == 0).sum()) for p in alike if p.shape[1] == 1)
    assert dropped == 6 * (5 - 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"total_step": None}, "total_step"),
        ({"total_step": 3}, "no step to choose"),
        ({"init_r": 6}, "init_r"),
        ({"rank_pattern": {"x.lora_E": [True] * 5}}, "no tensor"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 4}}, "`init_r`, 5, times"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 4 + [False]}}, "5 rows, 4 are left"),
        ({"rank_pattern": [1]}, "expected a mapping"),
        ({"lora_alpha": 0}, "above 0"),
        ({"beta2": 1}, "between 0 and 1"),
        ({"target_r": 9}, "more than `init_r`"),
        ({"use_dora": True}, "not supported"),
    ],
)
def test_a_folder_that_contradicts_itself(change, told, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), AdaLoRA(**fields("llama"))), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=told):
        peftctl.load(build("llama"), tmp_path)
