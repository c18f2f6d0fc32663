"""Ranks by gradient: against the weight's own gradient, within the budget, and once in the life of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build, inputs, logits

import peftctl
from peftctl.engine import rank_allocation
from peftctl.engine.attach import adapters_of, attach, methods
from peftctl.engine.rank_allocation import WIDEST, allocated, gains
from peftctl.engine.sample import Sample
from peftctl.errors import AdapterError
from peftctl.tasks.sft import SFT
from peftctl.verbs.mortal import one_thread

LORA = peftctl.METHODS["lora"]


def sample_for(model: torch.nn.Module) -> Sample:
    batch = inputs(model)
    return Sample(None, lambda: iter([batch | {"labels": batch["input_ids"]}] * 2), SFT().loss)


def test_the_probe_sees_a_sketch_of_the_gradient_of_the_weight():
    model = build("llama")
    attach(model, LORA(r=6, alpha=12), "probe")
    found = gains(model, "probe", sample_for(model))
    site = "model.layers.0.self_attn.q_proj"
    A = adapters_of(model, "probe")[site].lora_A.weight.detach()
    plain = build("llama")
    weight = plain.get_submodule(site).weight
    for batch in sample_for(plain).batches():
        SFT().loss(plain, batch).backward()
    torch.testing.assert_close(found[site], torch.linalg.svdvals(weight.grad @ A.T).square(), rtol=1e-4, atol=1e-6)


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3), st.lists(st.floats(0, 1e6), min_size=1, max_size=20), min_size=1
    ),
    st.integers(1, 5),
    st.data(),
)
def test_the_budget_is_kept_and_goes_where_it_gains(values, r, data):
    found = {site: torch.tensor(sorted(v, reverse=True), dtype=torch.float64) for site, v in values.items()}
    costs = {site: data.draw(st.integers(1, 50)) for site in found}
    ranks = allocated(found, costs, r)
    assert sum(ranks[site] * costs[site] for site in found) <= r * sum(costs.values())
    assert all(1 <= ranks[site] <= max(1, min(WIDEST * r, len(found[site]))) for site in found)
    left = r * sum(costs.values()) - sum(ranks[site] * costs[site] for site in found)
    more = [s for s in found if ranks[s] < min(WIDEST * r, len(found[s])) and costs[s] <= left]
    assert not more  # nothing that fits is left over


def test_equal_costs_give_the_largest_gains():
    found = {"a": torch.tensor([9.0, 8.0, 7.0, 0.1]), "b": torch.tensor([5.0, 0.2, 0.1, 0.1]), "c": torch.zeros(4)}
    assert allocated(found, dict.fromkeys(found, 10), 2) == {"a": 3, "b": 2, "c": 1}


def test_a_planned_method_keeps_scale_and_budget_and_touches_nothing():
    model, method = build("llama"), LORA(r=4, alpha=6, rank_allocation="gradient")
    before, state = logits(model), torch.random.get_rng_state()
    planned = method.planned(model, sample_for(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    assert not methods(model)
    assert planned.planned(model, None) is planned
    attach(model, planned)
    chosen = adapters_of(model, "default")
    assert {adapter.scale for adapter in chosen.values()} == {1.5}
    ranks = {len(adapter.factors()[0]) for adapter in chosen.values()}
    assert len(ranks) > 1
    even = sum(p.numel() for p in attach(build("llama"), LORA(r=4)).parameters() if p.requires_grad)
    assert 0.9 * even < sum(p.numel() for p in model.parameters() if p.requires_grad) <= even


def test_a_look_at_the_data_that_fails_leaves_nothing_attached(monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    model, method = build("llama"), LORA(r=4, rank_allocation="gradient")
    monkeypatch.setattr(rank_allocation, "gains", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        method.planned(model, sample_for(model))
    assert not methods(model)
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_what_cannot_be_is_said():
    with pytest.raises(AdapterError, match="rank_allocation"):
        attach(build("llama"), LORA(rank_allocation="gradient"))
    with pytest.raises(ValueError, match="chooses the ranks"):
        LORA(rank_allocation="gradient", rank_pattern={"q_proj": 3})


def test_a_run_plans_once_and_writes_it_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with one_thread():
        base = tiny_chat.write_base(tmp_path / "base")
        rows = tiny_chat.write_rows(tmp_path / "rows.jsonl", tiny_chat.chats(11))
        method = {"type": "lora", "r": 4, "rank_allocation": "gradient"}
        made = tiny_chat.recipe(base, rows, method=method, trainer={"steps": 4, "save_every": 2})
        peftctl.train(made, output=tmp_path / "run")
        config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert len(set(config["rank_pattern"].values())) > 1

        def no_more(*_: Any) -> None:
            raise AssertionError("planned again")

        monkeypatch.setattr(rank_allocation, "gains", no_more)
        for part in ("adapter", "checkpoints/step-000004"):
            (tmp_path / "run" / part).rename(tmp_path / part.replace("/", "-"))
        peftctl.train(made, output=tmp_path / "run", resume=True)
    again, first = (tmp_path / "run/adapter", tmp_path / "adapter")
    assert (again / "adapter_model.safetensors").read_bytes() == (first / "adapter_model.safetensors").read_bytes()
