"""AdaLoRA's own arithmetic: the update, the importance of triplets, the budget, what a run leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from safetensors.torch import load_file
from tiny import build, inputs, logits, stir
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine.attach import adapters_of, live, trained
from peftctl.engine.triplets import SVDLinear
from peftctl.errors import AdapterError
from peftctl.methods.adalora import AdaLoRA
from peftctl.verbs.mortal import one_thread

TARGETS = ["q_proj", "v_proj"]


def adapters(model: nn.Module, name: str = "default") -> list[SVDLinear]:
    return [a for a in adapters_of(model, name).values() if isinstance(a, SVDLinear)]


def ranks(model: nn.Module) -> list[int]:
    return [len(a.rows()) for a in adapters(model)]


def attached(**fields: Any) -> tuple[nn.Module, AdaLoRA]:
    method = AdaLoRA(**{"target_modules": TARGETS, "init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 4} | fields)
    torch.manual_seed(0)
    return peftctl.attach(build("llama"), method), method


def run(model: nn.Module, method: AdaLoRA, steps: int, first: int = 0, last: int | None = None) -> Iterator[int]:
    """Train as the loop does; yields the number of each step before its gradients go."""
    update = torch.optim.AdamW(trained(model).values(), lr=5e-2)
    batch = inputs(model)
    for step in range(first, steps if last is None else last):
        loss = model(**batch, labels=batch["input_ids"]).loss
        (loss + method.penalty(model)).backward()
        update.step()
        before = [(p.detach().clone(), p.grad.clone()) for p in trained(model).values()]
        method.after_step(model, step, steps)
        model.seen = before
        yield step + 1
        update.zero_grad(set_to_none=True)


def finish(model: nn.Module, method: AdaLoRA, steps: int) -> None:
    for _ in run(model, method, steps):
        pass


def test_how_many_parameters_llama_7b_trains():
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig())  # its defaults are those of the first 7B model
    model = peftctl.attach(skeleton, AdaLoRA(init_r=12, target_modules=TARGETS))
    assert sum(p.numel() for p in trained(model).values()) == 32 * 2 * 12 * (4096 + 4096 + 1)


def test_the_equation():
    model, _ = attached(alpha=20)
    stir(model)
    for site, adapter in adapters_of(model, "default").items():
        host, x = model.get_submodule(site), torch.randn(2, 3, 32)
        update = adapter.lora_B @ torch.diag(adapter.lora_E[:, 0]) @ adapter.lora_A
        torch.testing.assert_close(host(x), x @ (host.weight + 20 / 5 * update).T, rtol=1e-4, atol=1e-5)


def test_penalty_is_the_mean_distance_from_orthogonal():
    model, method = attached(orth_reg_weight=0.25)
    stir(model)
    distances = []
    for adapter in adapters(model):
        P, Q = adapter.lora_B.detach().double(), adapter.lora_A.detach().double()
        for product in (P.T @ P, Q @ Q.T):
            total = sum((float(product[i, j]) - (i == j)) ** 2 for i in range(5) for j in range(5))
            distances.append(math.sqrt(total))
    assert method.penalty(model).item() == pytest.approx(0.25 * sum(distances) / len(distances), rel=1e-5)
    method.penalty(model).backward()
    assert all(a.lora_A.grad.any() and a.lora_B.grad.any() and a.lora_E.grad is None for a in adapters(model))
    assert AdaLoRA(orth_reg_weight=0).penalty(model) == 0


def test_choices_are_those_of_the_equations():
    """Number by number in float64: what the paper says of every triplet, and the largest sums."""
    model, method = attached(deltaT=2)
    names = list(trained(model))
    smooth = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained(model).items()}
    spread = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained(model).items()}
    sites = sorted({name.rpartition(".")[0] for name in names}, key=[n.rpartition(".")[0] for n in names].index)
    kept = {(site, i) for site in sites for i in range(5)}
    tried = 0
    for t in run(model, method, 12):
        seen = dict(zip(names, model.seen, strict=True))
        if t < 8:
            for name, (value, gradient) in seen.items():
                sensitivity = (value.double() * gradient.double()).abs()
                smooth[name] = 0.85 * smooth[name] + 0.15 * sensitivity
                spread[name] = 0.85 * spread[name] + 0.15 * (sensitivity - smooth[name]).abs()
        if t in (4, 6, 8):
            importance = {}
            for site in sites:
                A, E, B = (smooth[f"{site}.lora_{n}"] * spread[f"{site}.lora_{n}"] for n in "AEB")
                for i in range(5):
                    over_in = sum(float(A[i, j]) for j in range(A.shape[1])) / A.shape[1]
                    over_out = sum(float(B[j, i]) for j in range(B.shape[0])) / B.shape[0]
                    importance[site, i] = float(E[i, 0]) + over_in + over_out
            budget = int(8 + (20 - 8) * (1 - (t - 2) / (12 - 2 - 4)) ** 3)
            kept = set(sorted(importance, key=importance.get, reverse=True)[:budget])
            tried += 1
        for site in sites:
            adapter = model.get_submodule(site)
            assert {i for i in range(5) if adapter.kept[i]} == {i for where, i in kept if where == site}
            before = seen[f"{site}.lora_E"][0]
            dropped = ~adapter.kept[:, None] & torch.tensor(t in (4, 6) or t >= 8)
            assert torch.equal(adapter.lora_E, before.masked_fill(dropped, 0))
    assert tried == 3
    assert len(kept) == 8
    assert len(set(ranks(model))) > 1  # the ranks differ: importance decides, not the number of the module


def test_budget_falls_as_a_cube_and_ends_at_the_target():
    model, method = attached()
    sums = [sum(ranks(model)) for _ in run(model, method, 12)]
    cube = [int(8 + 12 * (1 - (t - 2) / 6) ** 3) for t in range(3, 9)]
    assert sums == [20, 20, *cube, 8, 8, 8, 8]
    assert cube[-1] == 8


def test_what_was_left_out_follows_from_the_steps_of_the_run():
    assert AdaLoRA().schedule(1000) == (100, 500, 2, 1000)
    assert AdaLoRA().schedule(3) == (0, 1, 1, 3)
    assert AdaLoRA(tinit=7, tfinal=0, deltaT=5).schedule(1000) == (7, 0, 5, 1000)
    assert AdaLoRA(total_step=400).schedule(1000) == (40, 200, 1, 400)
    for steps in range(1, 40):
        assert AdaLoRA().schedule(steps).fits
    for steps in (1, 2, 5):
        model, method = attached(tinit=None, tfinal=None)
        finish(model, method, steps)
        assert sum(ranks(model)) == 8


def test_between_choices_triplets_may_come_back_and_are_saved(tmp_path):
    model, method = attached(deltaT=3, tinit=0, tfinal=4)
    for t in run(model, method, 12):
        if t == 3:
            chosen = sum(ranks(model))
        if t == 4:
            assert sum(ranks(model)) > chosen
            peftctl.save(model, tmp_path)
            assert torch.equal(logits(peftctl.load(build("llama"), tmp_path)), logits(model))


def test_modules_without_gradients_lose_their_triplets():
    model, method = attached(target_r=1, target_modules=["q_proj"])
    unused = adapters(model)[1]
    for step in range(12):
        adapters(model)[0].lora_A.grad = torch.ones_like(adapters(model)[0].lora_A)
        method.after_step(model, step, 12)
    assert not unused.kept.any()


def test_only_what_is_kept_is_written(tmp_path):
    model, method = attached()
    finish(model, method, 12)
    expected = logits(model)
    peftctl.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert [tuple(t.shape) for key, t in sorted(tensors.items()) if key.endswith("lora_E")] == [
        (r, 1) for r in ranks(model)
    ]
    loaded = peftctl.load(build("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    assert [len(a.lora_E) for a in adapters(loaded)] == ranks(model)
    torch.testing.assert_close(logits(peftctl.merge(loaded)), expected, rtol=1e-4, atol=1e-5)


def test_a_loaded_adapter_keeps_its_ranks_when_trained_further(tmp_path):
    model, method = attached()
    finish(model, method, 12)
    peftctl.save(model, tmp_path / "first")
    loaded = peftctl.load(build("llama"), tmp_path / "first")
    had, before = ranks(loaded), logits(loaded)
    method = peftctl.engine.attach.methods(loaded)["default"]
    finish(loaded, method, 3)  # fewer steps than its schedule has
    assert ranks(loaded) == had
    assert not torch.allclose(logits(loaded), before)
    peftctl.save(loaded, tmp_path / "second")
    torch.testing.assert_close(logits(peftctl.load(build("llama"), tmp_path / "second")), logits(loaded))


def test_a_run_may_start_from_a_pruned_adapter_and_shrink_it_further():
    earlier, method = attached()
    finish(earlier, method, 12)
    later, method = attached(alpha=3, target_r=1, bias="all")
    for new, old in zip(adapters(later), adapters(earlier), strict=True):
        new.continue_from(old)
    torch.testing.assert_close(logits(later), logits(earlier), rtol=1e-5, atol=1e-6)
    assert ranks(later) == ranks(earlier)
    assert live(later).keys() == live(attached(bias="all")[0]).keys()
    finish(later, method, 12)
    assert sum(ranks(later)) == 4
    other, _ = attached(init_r=6)
    with pytest.raises(AdapterError, match="started with 5 triplets there, 6 here"):
        adapters(other)[0].continue_from(adapters(earlier)[0])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_r": 13}, "more than `init_r`"),
        ({"total_step": 10, "tinit": 6, "tfinal": 4}, "no step"),
        ({"rank_pattern": {"q_proj.lora_E": [True]}}, "`init_r` times"),
    ],
)
def test_settings_that_contradict_each_other(fields, told):
    with pytest.raises(ValueError, match=told):
        AdaLoRA(**fields)


def test_a_schedule_longer_than_the_run_is_refused():
    model, method = attached(tinit=6, tfinal=6)
    with pytest.raises(AdapterError, match=r"6 steps before and 6 after .* leave none of 12"):
        method.after_step(model, 0, 12)


def test_a_pattern_for_a_module_that_is_not_there_is_refused():
    with pytest.raises(AdapterError, match=r"`k_proj.lora_E` is no module"):
        attached(rank_pattern={"k_proj.lora_E": [True] * 5})


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Any]:
    base = tiny_chat.write_base(tmp_path / "base")
    rows = tiny_chat.write_rows(tmp_path / "rows.jsonl", tiny_chat.chats(11))
    method = {"type": "adalora", "target_r": 2, "init_r": 5, "r": None, "alpha": 8, "tinit": 1, "tfinal": 3}
    made = tiny_chat.recipe(base, rows, method=method, trainer={"steps": 9, "save_every": 2})
    del made["method"]["r"]
    return made


class Killed(BaseException):
    """A process ends where it stands."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains `recipe` into `folder` until a step is over, but not yet told."""
    from peftctl.training.journal import Journal

    real = Journal.write

    def train(recipe: Any, folder: Path, step: int) -> None:
        def write(self: Journal, event: Any) -> None:
            if event["event"] == "step" and event["step"] == step:
                raise Killed
            real(self, event)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", write)
            with pytest.raises(Killed):
                peftctl.train(recipe, output=folder)

    return train


def same(one: Path, other: Path) -> bool:
    """Whether two runs left the same bits and told the same losses."""
    files = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    losses = [[event["loss"] for event in tiny_chat.steps(run)] for run in (one, other)]
    return losses[0] == losses[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def ranks_in(run: Path) -> list[int]:
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    return [len(tensor) for key, tensor in sorted(tensors.items()) if key.endswith("lora_E")]


def test_an_interrupted_run_ends_with_the_same_bits(recipe, killed, tmp_path):
    with one_thread():
        peftctl.train(recipe, output=tmp_path / "whole")
        assert sum(ranks_in(tmp_path / "whole")) == 2 * 14
        for step in (4, 8):  # among the choices, and after the last
            run = tmp_path / f"killed at {step}"
            killed(recipe, run, step)
            peftctl.train(recipe, output=run, resume=True)
            assert same(run, tmp_path / "whole")


@pytest.mark.filterwarnings("error:grad and param")
def test_a_run_goes_on_from_a_pruned_adapter_and_is_resumed(recipe, killed, tmp_path):
    with one_thread():
        peftctl.train(recipe, output=tmp_path / "first")
        recipe["method"] |= {"init_from": str(tmp_path / "first/adapter"), "target_r": 1}
        peftctl.train(recipe, output=tmp_path / "second")
        assert sum(ranks_in(tmp_path / "second")) == 14
        assert all(b <= a for a, b in zip(ranks_in(tmp_path / "first"), ranks_in(tmp_path / "second"), strict=True))
        killed(recipe, tmp_path / "killed", 5)
        peftctl.train(recipe, output=tmp_path / "killed", resume=True)
        assert same(tmp_path / "killed", tmp_path / "second")
