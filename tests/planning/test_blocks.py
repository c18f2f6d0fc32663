"""A deep model seen through a few of its blocks is the same as seen whole."""

from __future__ import annotations

from typing import Any

import pytest
from planned import estimated

from peftctl.planning import blocks


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainer": {"gradient_checkpointing": False}},
        {"model": {"quantization": "nf4"}, "trainer": {"batch_size": 8}},
        {"method": {"type": "full"}},
        {"model": {"device": "cpu"}},
    ],
    ids=str,
)
def test_a_few_blocks_tell_all(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    few = estimated("HuggingFaceTB/SmolLM2-135M", rows=2, length=128, **changes)
    monkeypatch.setattr(blocks, "alike", lambda model: [])
    whole = estimated("HuggingFaceTB/SmolLM2-135M", rows=2, length=128, **changes)
    assert few.peak == pytest.approx(whole.peak, rel=0.02)
    assert few.step.flops == pytest.approx(whole.step.flops, rel=0.01)
