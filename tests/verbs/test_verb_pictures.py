"""From a handful of pictures to what diffusers draws: train, resume, eval, export, merge and generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pictures import PIPELINES, SIDE, drawn, load_pipeline, write_pictures
from two_processes import compare, launched, torchrun

import peftctl
from peftctl.config.write import to_yaml
from peftctl.engine.attach import attach
from peftctl.engine.disk import save
from peftctl.engine.tensor_file import WEIGHTS
from peftctl.errors import AdapterError, ModelError, RecipeError, RunError
from peftctl.exports.diffusers_lora import FILE
from peftctl.exports.pipeline import merge_pipeline
from peftctl.methods import METHODS
from peftctl.models.folder import PIPELINE
from peftctl.models.tiny_pipeline import write_pipeline
from peftctl.verbs.adapters import resize
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.export import export
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge
from peftctl.verbs.train import train

SD = PIPELINES[0]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {name: write_pipeline(name, folder / name) for name in PIPELINES}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def recipe(base: Path, pictures: Path, **blocks: Any) -> dict[str, Any]:
    trainer = {"task": {"type": "text_to_image", "resolution": SIDE, **blocks.pop("task", {})}, "steps": 40}
    trainer |= {"batch_size": 5, "micro_batch_size": 5, "learning_rate": 1e-2, "save_every": 20, "eval_every": 40}
    return {
        "model": {"name_or_path": str(base), "dtype": "float32", "device": "cpu"},
        "method": {"type": "lora", "r": 4, "alpha": 8, "target_modules": "attention", **blocks.pop("method", {})},
        "dataset": {"train": str(pictures), "eval": str(pictures), "format": "image_text"},
        "trainer": trainer | blocks.pop("trainer", {}),
        "output": "runs/style",
        **blocks,
    }


@pytest.fixture(scope="module")
def runs(pipelines: dict[str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each pipeline, which no test may change."""
    folder = tmp_path_factory.mktemp("runs")
    for name, base in pipelines.items():
        train(recipe(base, pictures), output=folder / name)
    return {name: folder / name for name in pipelines}


@pytest.mark.parametrize("name", PIPELINES)
def test_training_beats_the_base(name: str, runs: dict[str, Path], tmp_path: Path):
    shutil.copytree(runs[name], tmp_path / "run")
    figures = evaluate(str(tmp_path / "run"))["figures"]
    assert figures["adapter"]["denoising_loss"] < 0.95 * figures["base"]["denoising_loss"]


def test_a_resumed_run_is_the_uninterrupted_one(runs: dict[str, Path], tmp_path: Path):
    again = tmp_path / "again"
    shutil.copytree(runs[SD], again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / "step-000040")
    train(str(again / "recipe.yaml"), output=again, resume=True)
    one, other = (load_file(run / "adapter" / WEIGHTS) for run in (runs[SD], again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", [name for name in PIPELINES if "PixArt" not in name])
def test_diffusers_draws_what_the_run_learned(
    name: str, runs: dict[str, Path], pipelines: dict[str, Path], tmp_path: Path
):
    base = load_pipeline(pipelines[name])
    before = drawn(base.pipeline)
    ours = drawn_with(pipelines[name], runs[name] / "adapter")
    export(str(runs[name]), tmp_path / "given", format="peft")
    for folder in (runs[name] / "adapter", tmp_path / "given"):
        theirs = getattr(diffusers, name).from_pretrained(pipelines[name])
        assert torch.equal(drawn(theirs), before)
        theirs.load_lora_weights(str(folder))
        assert torch.allclose(drawn(theirs), ours, atol=1e-4)
    assert (ours - before).abs().max() > 0.01


def drawn_with(base: Path, adapter: Path) -> Any:
    loaded = load_pipeline(base)
    peftctl.load(loaded.model, adapter)
    return drawn(loaded.pipeline)


@pytest.mark.parametrize("method", [{"use_rslora": True}, {"type": "dora"}, {"rank_pattern": {"attn1.to_q": 2}}])
def test_every_form_of_lora_reaches_diffusers(
    method: dict[str, Any], pipelines: dict[str, Path], pictures: Path, tmp_path: Path
):
    made = recipe(pipelines[SD], pictures, method=method, trainer={"steps": 4, "learning_rate": 0.05})
    run = Path(train(made, output=tmp_path / "run")["path"])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(pipelines[SD])
    before = drawn(theirs)
    theirs.load_lora_weights(str(run / "adapter"))
    found = drawn(theirs)
    assert torch.allclose(found, drawn_with(pipelines[SD], run / "adapter"), atol=1e-4)
    assert (found - before).abs().max() > 0.01


def test_what_is_made_of_an_adapter_reaches_diffusers_too(
    runs: dict[str, Path], pipelines: dict[str, Path], tmp_path: Path
):
    """An adapter folder alone, without a run around it, is known for what it is."""
    resize(str(runs[SD]), tmp_path / "small", r=2)
    assert not (tmp_path / "small" / FILE).exists()
    export(str(tmp_path / "small"), tmp_path / "given")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(pipelines[SD])
    theirs.load_lora_weights(str(tmp_path / "given"))
    assert torch.allclose(drawn(theirs), drawn_with(pipelines[SD], tmp_path / "small"), atol=1e-4)
    assert "pipeline.load_lora_weights" in (tmp_path / "given" / "README.md").read_text()
    merge(str(tmp_path / "small"), tmp_path / "merged")
    merged = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert torch.allclose(drawn(merged), drawn(theirs), atol=1e-4)


def test_other_methods_have_no_file_for_diffusers_and_it_is_said(
    pipelines: dict[str, Path], pictures: Path, tmp_path: Path
):
    heard: list[str] = []
    made = recipe(pipelines[SD], pictures, trainer={"steps": 1})
    made["method"] = {"type": "oft", "target_modules": "attention"}
    run = train(made, output=tmp_path / "run", listen=lambda event: heard.append(event.get("text", "")))["path"]
    assert any("`load_lora_weights` of diffusers reads LoRA and DoRA alone" in line for line in heard)
    assert not (Path(run) / "adapter" / FILE).exists()
    assert merge(run, tmp_path / "merged")["tensors"]["changed"]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_merged_pipeline_draws_the_same(
    name: str, runs: dict[str, Path], pipelines: dict[str, Path], tmp_path: Path
):
    report = merge(str(runs[name]), tmp_path / "merged")
    assert report["proof"]["difference"] < 1e-5 < report["proof"]["effect"]
    merged = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == name
    assert torch.allclose(drawn(merged), drawn_with(pipelines[name], runs[name] / "adapter"), atol=1e-4)
    with pytest.raises(AdapterError, match="this adapter is merged into it already"):
        merge(str(runs[name]), tmp_path / "twice", base=str(tmp_path / "merged"))


def test_parts_that_nobody_needs_are_copied_where_they_are_here(pipelines: dict[str, Path], tmp_path: Path):
    base = Path(shutil.copytree(pipelines[SD], tmp_path / "base"))
    index = json.loads((base / PIPELINE).read_text())
    index |= {
        "safety_checker": ["transformers", "CLIPTextModel"],
        "feature_extractor": ["transformers", "CLIPTokenizer"],
    }
    (base / PIPELINE).write_text(json.dumps(index))
    shutil.copytree(base / "text_encoder", base / "safety_checker")
    shutil.copytree(base / "tokenizer", base / "feature_extractor")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    loaded = load_pipeline(base)
    attach(loaded.model, METHODS["lora"](target_modules="attention"))
    save(loaded.model, tmp_path / "adapter")
    heard: list[str] = []
    for name in ("whole", "less"):
        merge_pipeline(base, tmp_path / "adapter", tmp_path / name, say=heard.append)
        (base / "safety_checker" / "model.safetensors").unlink(missing_ok=True)
    assert (tmp_path / "whole" / "safety_checker" / "model.safetensors").is_file()
    assert (tmp_path / "less" / "feature_extractor" / "tokenizer_config.json").is_file()
    assert json.loads((tmp_path / "less" / PIPELINE).read_text())["safety_checker"] == [None, None]
    assert any("`safety_checker` is left out" in line for line in heard)
    assert not list((tmp_path / "whole").rglob("*.bin"))


def test_two_processes_train_as_one(pipelines: dict[str, Path], tmp_path: Path):
    """Three pictures two at a time: in every second step one of the processes has none."""
    pictures = write_pictures(tmp_path / "pictures", 3)
    trainer = {"batch_size": 2, "micro_batch_size": 1, "steps": 4, "save_every": 4, "eval_every": 4}
    made = recipe(pipelines[SD], pictures, trainer=trainer | {"gradient_checkpointing": True})
    (tmp_path / "recipe.yaml").write_text(to_yaml(made))
    code, _, err = launched(torchrun(), tmp_path, "--output", "runs/two")
    assert code == 0, err
    train(made, output=tmp_path / "runs" / "one")
    compare(tmp_path / "runs" / "one", tmp_path / "runs" / "two")


def test_generate_draws_into_a_file(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def few(self: Any, text: str, **options: Any) -> Any:
        return call(self, text, num_inference_steps=2, **options)

    call = diffusers.StableDiffusionPipeline.__call__
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", few)
    names = [tmp_path / f"{number}.png" for number in range(4)]
    assert generate(str(runs[SD]), "a cat", output=names[0]) == str(names[0])
    generate(str(runs[SD] / "adapter"), "a cat", output=names[1])
    generate(str(runs[SD]), "a cat", output=names[2], base=True)
    generate(str(runs[SD]), "a cat", output=names[3], seed=1)
    assert Image.open(names[0]).size == (SIDE, SIDE)
    contents = [path.read_bytes() for path in names]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3
    with pytest.raises(RunError, match="`--output`: missing"):
        generate(str(runs[SD]), "a cat")


def test_recipes_that_cannot_be_are_refused(pipelines: dict[str, Path], pictures: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="acts on tokens"):
        train({**recipe(pipelines[SD], pictures), "method": {"type": "prompt"}}, output=tmp_path / "run")
    made = recipe(pipelines[SD], pictures)
    made["model"] |= {"quantization": "nf4", "attention": "eager"}
    with pytest.raises(ModelError, match="the network of a pipeline is not quantised") as caught:
        train(made, output=tmp_path / "run")
    assert len(caught.value.problems) == 2
    with pytest.raises(RecipeError, match="perplexity is not measured of `text_to_image`"):
        train({**recipe(pipelines[SD], pictures), "eval": {"metrics": ["perplexity"]}}, output=tmp_path / "run")
