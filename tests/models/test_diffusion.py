"""Pipelines of diffusers as base models: what is read, what is refused, what is fetched."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pictures import PIPELINES, load_pipeline

from peftctl.errors import ModelError
from peftctl.models import base as models
from peftctl.models import source
from peftctl.models.folder import DIFFUSERS, PIPELINE, fingerprint
from peftctl.models.head import DIFFUSION
from peftctl.models.tiny_pipeline import write_pipeline


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(PIPELINES[0], tmp_path_factory.mktemp("pipeline") / "sd")


@pytest.fixture
def sd(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "sd"))


def index(folder: Path, **changed: Any) -> None:
    path = folder / PIPELINE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize("name", [*PIPELINES, "PixArtSigmaPipeline"])
def test_a_pipeline_is_loaded_in_eval_mode_with_its_network_as_the_model(name: str, tmp_path: Path):
    base = load_pipeline(write_pipeline(name, tmp_path / name))
    assert type(base.pipeline).__name__ == name
    assert base.model is (base.pipeline.unet if hasattr(base.pipeline, "unet") else base.pipeline.transformer)
    assert not any(module.training for module in base.model.modules())
    assert base.model.name_or_path == base.name == str(tmp_path / name)
    assert base.tokenizer.model_max_length <= 300


def test_weights_come_in_the_dtype_asked_for_but_the_vae(sd: Path):
    base = load_pipeline(sd, dtype="bfloat16")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in base.pipeline.text_encoder.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in base.pipeline.vae.parameters()} == {torch.float32}


def pickled(folder: Path) -> None:
    (folder / "unet" / DIFFUSERS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "vae" / DIFFUSERS
    path.write_bytes(path.read_bytes()[:1000])


def without_a_tensor(folder: Path) -> None:
    path = folder / "unet" / DIFFUSERS
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})


def for_inpainting(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another class": (lambda folder: index(folder, _class_name="FluxPipeline"), "a `FluxPipeline` is not trained here"),
    "no class": (lambda folder: index(folder, _class_name=["x"]), "is not trained here"),
    "code of its own": (
        lambda folder: index(folder, unet=["my_unet", "MyUNet"]),
        f"{PIPELINE}: `unet` is a `MyUNet`",
    ),
    "another scheduler": (
        lambda folder: index(folder, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "`scheduler` is a `FlowMatchEulerDiscreteScheduler`",
    ),
    "no vae": (lambda folder: index(folder, vae=[None, None]), "`vae` is missing"),
    "no folder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder: missing"),
    "no index": (
        lambda folder: (folder / PIPELINE).unlink(),
        f"no pipeline of diffusers here: `{PIPELINE}` is missing",
    ),
    "pickled": (pickled, "unet: its weights are pickles"),
    "truncated": (truncated, "vae/diffusion_pytorch_model.safetensors: damaged or truncated"),
    "a tensor is missing": (without_a_tensor, "unet: "),
    "inpainting": (for_inpainting, "its network reads 9 channels, its VAE makes 4"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_cannot_be_trained_is_refused_with_its_reason(how: str, sd: Path):
    spoil, text = SPOILT[how]
    spoil(sd)
    with pytest.raises(ModelError) as caught:
        load_pipeline(sd)
    assert text in str(caught.value)
    assert str(sd) in str(caught.value)


def test_all_parts_of_other_classes_are_told_at_once(sd: Path):
    index(sd, unet=["diffusers", "UNet3D"], vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(ModelError) as caught:
        load_pipeline(sd)
    assert [problem.hint for problem in caught.value.problems] == [
        "expected `AutoencoderKL`",
        "expected `UNet2DConditionModel`",
    ]


def test_a_pipeline_is_no_language_model(sd: Path):
    with pytest.raises(ModelError) as caught:
        models.load(models.Model(name_or_path=str(sd), device="cpu"))
    assert "`trainer.task: text_to_image` trains" in str(caught.value.problems[0].hint)


def test_without_diffusers_its_extra_is_named(sd: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError) as caught:
        load_pipeline(sd)
    assert caught.value.problems[0].hint == "install it: `pip install 'peftctl[diffusion]'`"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_another_part_is_another_base(part: str, sd: Path, tmp_path: Path):
    before = fingerprint(sd)
    [file] = (sd / part).glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    now = fingerprint(sd)
    assert now["weights"] != before["weights"]
    assert now["config"] == before["config"]


def test_of_a_hub_id_only_the_weights_of_its_parts_are_fetched(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    snapshot, fetched = tmp_path / "snapshots" / ("0" * 40), []

    def small(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        shutil.copytree(written, snapshot, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return str(snapshot)

    def large(repo: str, name: str, *, revision: str) -> None:
        fetched.append(name)
        shutil.copy(written / name, snapshot / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", small)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", large)
    words = models.load_tokenizer(models.Model(name_or_path="some/sd"), head=DIFFUSION)
    assert (words.model_max_length, fetched) == (77, [])
    assert source.fetch("some/sd", None, weights=True) == snapshot
    assert fetched == [f"unet/{DIFFUSERS}", f"vae/{DIFFUSERS}", "text_encoder/model.safetensors"]
