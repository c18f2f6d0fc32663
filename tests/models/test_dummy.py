"""A model of the true shapes, without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftctl.errors import ModelError
from peftctl.models import base as models
from peftctl.models.base import Model
from peftctl.models.dummy import placed
from peftctl.models.head import CAUSAL, SEQ2SEQ, Head
from peftctl.models.known import known, parameters


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("name", "head"), [("HuggingFaceTB/SmolLM2-135M", CAUSAL), ("google/flan-t5-small", SEQ2SEQ)], ids=str
)
def test_it_has_as_many_parameters_as_the_real_one(name: str, head: Head):
    model = placed(Model(name_or_path=name, load_format="dummy", dtype="bfloat16", device="cpu"))
    base = models.load(model, head)
    assert sum(p.numel() for p in base.model.parameters()) == parameters(known()[name])
    assert all(bool(torch.isfinite(p).all()) for p in base.model.parameters())
    ids = torch.tensor([base.tokenizer("hello").input_ids])
    extra = {"decoder_input_ids": ids} if head is SEQ2SEQ else {}
    logits = base.model(input_ids=ids, **extra).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_it_is_quantised_as_the_real_one(quantization: str):
    asked = Model(
        name_or_path="HuggingFaceTB/SmolLM2-135M",
        load_format="dummy",
        dtype="bfloat16",
        device="cpu",
        quantization=quantization,  # type: ignore[arg-type]
    )
    network = models.load(placed(asked)).model
    kinds = {type(module).__name__ for module in network.model.layers.modules()}
    assert ("Linear4bit" if quantization == "nf4" else "Linear8bitLt") in kinds
    assert type(network.lm_head).__name__ == "Linear"
    assert bool(torch.isfinite(network(input_ids=torch.tensor([[1, 2, 3]])).logits).all())


def test_what_is_not_known_is_refused():
    with pytest.raises(ModelError, match="its architecture is not known here"):
        placed(Model(name_or_path="nobody/nothing", load_format="dummy"))
