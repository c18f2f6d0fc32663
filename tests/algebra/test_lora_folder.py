from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, logits, stir

import peftctl
from peftctl.algebra.lora_folder import read_lora_folder, write_lora_folder
from peftctl.errors import AdapterError, StorageError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def rewrite(folder, **changes):
    kept = {**load_file(folder / WEIGHTS), **changes}
    save_file({key: tensor for key, tensor in kept.items() if tensor is not None}, folder / WEIGHTS)


def test_what_is_read_is_written_with_the_same_function_and_tensors(make, tmp_path):
    folder = make(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True)
    adapter = read_lora_folder(folder)
    size = write_lora_folder(adapter, tmp_path / "copy")
    assert size == sum(path.stat().st_size for path in (tmp_path / "copy").iterdir())
    ours, theirs = load_file(folder / WEIGHTS), load_file(tmp_path / "copy" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_folder_of_peft_in_half_precision_is_read(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(build("llama"), config).eval()
    stir(theirs)
    theirs.half().save_pretrained(tmp_path / "theirs")
    adapter = read_lora_folder(tmp_path / "theirs")
    update = adapter.updates["model.layers.1.self_attn.q_proj"]
    assert (update.rank, update.scale, update.A.dtype) == (3, pytest.approx(5 / 3), torch.float32)
    write_lora_folder(adapter, tmp_path / "ours")
    one, two = (logits(peftctl.load(build("llama"), tmp_path / name)) for name in ("theirs", "ours"))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strange": torch.zeros(2)}, "`strange` is not part of this adapter"),
        ({B: None}, "q_proj.lora_B.weight` is missing"),
        ({B: torch.full((32, 4), float("nan"))}, "lora_B.weight` is not finite"),
        ({B: torch.zeros(32, 5)}, r"A is \[4, 32\] and B \[32, 5\], which do not multiply"),
        ({B: torch.zeros(32, 4, dtype=torch.int64)}, "holds I64, which is no floating-point type"),
        ({A: torch.zeros(3, 32)}, "has rank 3, the config says 4"),
    ],
)
def test_a_damaged_folder_is_refused(make, changes, message):
    folder = make()
    rewrite(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        read_lora_folder(folder)


def test_another_method_is_sent_to_convert(make):
    with pytest.raises(AdapterError, match="is no plain LoRA; `peftctl adapters convert` makes one of it"):
        read_lora_folder(make(method="vera", r=8))


def test_an_occupied_output_stays_as_it_was(make, tmp_path):
    adapter = read_lora_folder(make())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        write_lora_folder(adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_nothing_is_left_of_what_could_not_be_written(make, tmp_path):
    adapter = read_lora_folder(make())
    site = next(iter(adapter.updates))
    adapter.updates[site] = replace(adapter.updates[site], B=adapter.updates[site].B * float("inf"))
    with pytest.raises(AdapterError, match="would not be finite and was not written"):
        write_lora_folder(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_says_which_base_it_is_of_comes_along(make, tmp_path):
    folder = make()
    (folder / "peftctl.json").write_text('{"base": {"weights": "x"}}')
    (folder / "README.md").write_text("a card of the old one")
    write_lora_folder(read_lora_folder(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "peftctl.json").read_text()) == {"base": {"weights": "x"}}
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("leaf", ["lora_embedding_B", "inner.lora_B.weight"])
def test_factors_that_belong_to_no_update_are_refused(make, leaf):
    folder = make()
    file = folder / "adapter_model.safetensors"
    name = f"model.layers.0.self_attn.q_proj.{leaf}"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.zeros(2, 4)}, file)
    with pytest.raises(AdapterError, match=f"`{name}` is not part of this adapter"):
        read_lora_folder(folder)
