"""What a quantised load does to weights, done without loading: the same linears, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftctl.engine import hosts
from peftctl.engine.anatomy import modules
from peftctl.errors import RunError
from peftctl.exports.dequantise import Dequantised, Quantised, linears
from peftctl.exports.merge import merge
from peftctl.exports.skeleton import keys, skeleton
from peftctl.exports.weights import Weights
from peftctl.models.base import load

Make = Callable[..., Path]


def dequantised(base: Path, how: Quantised) -> Dequantised:
    model, found = skeleton(base, "base"), Weights(base, "base")
    names = linears(model)
    return Dequantised(base, "base", how, {key: names[n] for n, key in keys(model, found).items() if n in names})


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_a_quantised_load(name: str, kind: Any, dtype: torch.dtype, make_base: Make) -> None:
    base = make_base(name)
    how = Quantised(kind=kind, double=True, dtype=dtype)
    loaded = load(how.block(base)).model
    found = {f"{site}.weight": m for site, m in modules(loaded) if hosts.is_quantised(m)}
    weights = dequantised(base, how)
    assert weights.linears.keys() == found.keys()
    before = load_file(base / "model.safetensors")
    for key, module in found.items():
        host = weights.linears[key]
        ours = hosts.stored(host, weights.read(key)).float()
        assert torch.equal(ours, hosts.weight(module).float())
        assert not torch.equal(weights.read(key).float(), before[key])
    assert all(torch.equal(weights.read(key), before[key]) for key in before.keys() - found.keys())


def test_whole_and_layer_by_layer(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("gpt2")
    how = Quantised(kind="nf4", double=True, dtype=torch.float32)
    adapter = make_adapter(base, target_modules=["c_attn"])
    whole = merge(base, adapter, tmp_path / "one", into="dequantised", quantised=how)
    layered = merge(base, adapter, tmp_path / "two", into="dequantised", quantised=how, memory=0)
    for report in (whole, layered):
        assert report["proof"]["difference"] < 1e-5
        assert report["proof"]["merged_from_quantised_run"]["relative_norm"] < 1e-4
        assert len(report["tensors"]["changed"]) == 2  # the other linears are as they were in training
    # into the base as it was, the run is further away, which is told and not judged
    report = merge(base, adapter, tmp_path / "three", quantised=how)
    assert report["proof"]["difference"] < 1e-5
    assert report["proof"]["merged_from_quantised_run"]["relative_norm"] > 1e-3


def test_dequantised_wants_to_know_how(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama")
    with pytest.raises(RunError, match="not trained on quantised weights"):
        merge(base, make_adapter(base), tmp_path / "out", into="dequantised")
