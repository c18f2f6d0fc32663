"""Merging as a stream: how much is in memory, what stops it, and what the disk gives back."""

from __future__ import annotations

import errno
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from faulty_disk import FaultyDisk, installed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftctl.errors import ModelError, NotMergeable, StorageError
from peftctl.exports import merge as module
from peftctl.exports.merge import merge
from peftctl.exports.plan import Part
from peftctl.exports.running import layered
from peftctl.exports.shards import share_out
from peftctl.exports.skeleton import blocks
from peftctl.exports.weights import Weights
from peftctl.methods.lora import LowRank

Make = Callable[..., Path]


@pytest.fixture
def base(make_base: Make) -> Path:
    return make_base("llama")


@pytest.fixture
def adapter(base: Path, make_adapter: Make) -> Path:
    return make_adapter(base)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into" / "merged"


def assert_nothing(out: Path) -> None:
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("shard_size", [5.0, 1e-5], ids=["one file", "many files"])
def test_two_tensors_in_memory_at_most(
    shard_size: float, base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, after = Weights.read, Part.after
    alive: dict[str, list[weakref.ref[Tensor]]] = {"read": [], "made": []}
    most = {"read": 0, "made": 0}
    writing = True

    def seen(kind: str, tensor: Tensor) -> Tensor:
        if writing:
            alive[kind].append(weakref.ref(tensor))
            most[kind] = max(most[kind], sum(ref() is not None for ref in alive[kind]))
        return tensor

    def say(line: str) -> None:
        nonlocal writing
        writing = writing and not line.startswith("proving")

    monkeypatch.setattr(Weights, "read", lambda self, name: seen("read", read(self, name)))
    monkeypatch.setattr(Part, "after", lambda self, weights: seen("made", after(self, weights)))
    report = merge(base, adapter, out, shard_size=shard_size, say=say)
    assert not writing
    assert len(alive["made"]) == report["tensors"]["total"] > 20
    assert most["read"] in (1, 2)  # the one that is being made, and the one that is being written
    assert most["made"] in (1, 2)


def test_a_layer_is_in_memory_only_while_it_runs(base: Path) -> None:
    model = layered(base, Weights(base, "base"))
    held: list[int] = []

    def count(*_: Any) -> None:
        held.append(sum(not p.is_meta for block in blocks(model) for p in block.parameters()))

    for block in blocks(model):
        block.register_forward_pre_hook(count)  # after the hook that fills the layer
    found = tiny.logits(model)
    one = sum(1 for _ in blocks(model)[0].parameters())
    assert held == [one, one]
    assert all(p.is_meta for block in blocks(model) for p in block.parameters())
    assert torch.equal(found, tiny.logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()))


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=["bias", "head"])
def test_the_proof_is_the_same_layer_by_layer(
    name: str, fields: dict[str, Any], make_base: Make, make_adapter: Make, out: Path
) -> None:
    base = make_base(name)
    adapter = make_adapter(base, **fields)
    whole = merge(base, adapter, out)["proof"]
    layered = merge(base, adapter, out.with_name("layered"), memory=0)["proof"]
    assert layered["adapter_from_base"] == pytest.approx(whole["adapter_from_base"], rel=1e-4)
    assert layered["difference"] < 1e-5
    assert layered["adapter_from_base"]["max_difference"] > 0.01


def test_a_wrong_merge_is_seen_layer_by_layer(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRank, "merged", lambda self, value, name="weight": value.clone())
    with pytest.raises(ModelError, match="is not the adapter on its base"):
        merge(base, adapter, out, memory=0)
    assert_nothing(out)


@pytest.mark.parametrize("at", [0, 7, 20])
def test_ctrl_c_leaves_nothing(at: int, base: Path, adapter: Path, out: Path) -> None:
    seen = 0

    def progress(done: int, total: int) -> None:
        nonlocal seen
        assert 0 <= done < total
        seen += 1
        if seen > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, out, progress=progress)
    assert_nothing(out)


def test_ctrl_c_in_the_proof_leaves_nothing(base: Path, adapter: Path, out: Path) -> None:
    def say(line: str) -> None:
        if line.startswith("proving"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, out, say=say)
    assert_nothing(out)


def test_a_disk_that_fills_up(base: Path, adapter: Path, out: Path) -> None:
    with installed(FaultyDisk(at=12, error=errno.ENOSPC)), pytest.raises(StorageError, match="no space left"):
        merge(base, adapter, out)
    assert_nothing(out)


def test_a_disk_that_is_too_small(base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(StorageError, match="are free"):
        merge(base, adapter, out)
    assert_nothing(out)


def test_a_tensor_that_changed_on_the_way(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_shards

    def flipped(folder: Path, *rest: Any) -> Any:
        written = write(folder, *rest)
        found = load_file(folder / "model.safetensors")
        found["model.norm.weight"][3] += 0.5  # no adapter stands there
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(module, "write_shards", flipped)
    with pytest.raises(StorageError, match=r"`model\.norm\.weight` changed though no adapter touches it"):
        merge(base, adapter, out)
    assert_nothing(out)


def test_every_site_that_cannot_be_merged_is_named(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LowRank, value: Tensor, name: str = "weight") -> Tensor:
        raise NotMergeable("more than a change of weights")

    monkeypatch.setattr(LowRank, "merged", refuse)
    with pytest.raises(NotMergeable) as error:
        merge(base, adapter, out)
    assert len(error.value.problems) == 14
    assert "`model.layers.1.mlp.down_proj`: more than" in str(error.value)
    assert_nothing(out)


def test_a_name_that_is_not_in_the_files(base: Path, adapter: Path, out: Path) -> None:
    found = load_file(base / "model.safetensors")
    found["model.layers.0.self_attn.query.weight"] = found.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"`model.layers.0.self_attn.q_proj.weight` is not in the files"):
        merge(base, adapter, out)
    assert_nothing(out)


def test_what_float16_cannot_hold(base: Path, adapter: Path, out: Path) -> None:
    found = load_file(base / "model.safetensors")
    found["model.norm.weight"][0] = 1e5
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"`model\.norm\.weight`: not finite in float16"):
        merge(base, adapter, out, dtype="float16")
    assert_nothing(out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype(dtype: Any, make_base: Make, make_adapter: Make, out: Path) -> None:
    base = make_base("llama", dtype=torch.float32 if dtype != "float32" else torch.bfloat16)
    report = merge(base, make_adapter(base), out, dtype=dtype)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert report["proof"]["rounded_to"] == dtype
    assert 0 <= report["proof"]["difference"] <= report["proof"]["tolerance"]


def weaken(adapter: Path, factor: float) -> None:
    """Make the update that many times what it was."""
    file = adapter / "adapter_model.safetensors"
    found = load_file(file)
    save_file({key: value * (factor if "lora_B" in key else 1) for key, value in found.items()}, file)


def test_adapted_tensors_that_stay_as_they_were_are_listed(make_base: Make, make_adapter: Make, out: Path) -> None:
    base = make_base("llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, target_modules=["q_proj"])
    weaken(adapter, 1e-12)
    said: list[str] = []
    report = merge(base, adapter, out, say=said.append)
    assert report["tensors"]["changed"] == {}
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)]
    assert report["tensors"]["adapted_but_unchanged"] == names
    assert any("2 adapted tensors are as before" in line for line in said)


@pytest.mark.parametrize(("dtype", "hidden"), [("bfloat16", True), ("float32", False)])
def test_an_adapter_that_rounding_hides_is_told(
    dtype: Any, hidden: bool, make_base: Make, make_adapter: Make, out: Path
) -> None:
    base = make_base("llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, target_modules=["q_proj"])
    weaken(adapter, 1e-3)
    said: list[str] = []
    merge(base, adapter, out, dtype=dtype, say=said.append)
    assert any("rounding hides most of it" in line for line in said) is hidden


def test_files_hold_what_fits() -> None:
    parts = [Part(str(n), str(n), torch.float32, (size,)) for n, size in enumerate([2, 2, 9, 1, 1])]
    files = [[part.name for part in inside] for inside in share_out(parts, 16)]
    assert files == [["0", "1"], ["2"], ["3", "4"]]
