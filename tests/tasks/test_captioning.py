"""Pictures and their texts: transformers' own logits, a frozen picture encoder, captions that survive a merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chat
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    BlipConfig,
    BlipForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import peftctl
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.formats import Captioned, Text
from peftctl.engine.attach import adapters_of, attach, trained
from peftctl.errors import DataError, RecipeError
from peftctl.methods import METHODS
from peftctl.methods.lora import LoRA
from peftctl.models import base as models
from peftctl.models.recomputing import recompute
from peftctl.models.seeing import eyes
from peftctl.models.tokenizer import read_processor
from peftctl.tasks.captioning import Captioning, PictureEncoder
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 16, "patch_size": 8}


def blip() -> nn.Module:
    text = {**SEES, **IDS, "vocab_size": 96, "encoder_hidden_size": 32, "projection_dim": 32, "sep_token_id": 2}
    text |= {"is_decoder": True, "max_position_embeddings": 64}
    config = BlipConfig(text_config=text, vision_config={**SEES, **PATCHES}, image_text_hidden_size=32)
    return BlipForConditionalGeneration(config)


def git() -> nn.Module:
    return GitForCausalLM(
        GitConfig(vocab_size=96, max_position_embeddings=64, vision_config={**SEES, **PATCHES}, **SEES, **IDS)
    )


def vit_gpt2() -> nn.Module:
    words = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**SEES, **PATCHES), words)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return VisionEncoderDecoderModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"blip": blip, "git": git, "vit_gpt2": vit_gpt2}
EYES = {"blip": ["vision_model"], "git": ["git.image_encoder"], "vit_gpt2": ["encoder"]}


def write_base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = MODELS[kind]()
    tiny.stir(model)
    model.save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_base(kind, tmp_path_factory.mktemp(kind) / kind) for kind in MODELS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of pictures of one colour each, which is their text; the files lie beside the file of rows."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(30):
        name, colour = list(COLOURS.items())[number % 3]
        shade = tuple(min(255, part + number) for part in colour)
        Image.new("RGB", (20 + number, 18), shade).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": name})
    tiny_chat.write_rows(folder / "train.jsonl", rows[:24])
    tiny_chat.write_rows(folder / "held-out.jsonl", rows[24:])
    return folder


def loaded(folder: Path) -> models.Base:
    return models.load(models.Model(name_or_path=str(folder), dtype="float32", device="cpu"), Captioning().head)


def encoded(base: models.Base, rows: list[Captioned], prompt: str = "") -> list[Encoded]:
    task = Captioning(prompt=prompt)
    encoder = task.ready(task.encoder(Dataset(train="rows.jsonl"), base.tokenizer, None), base)
    return [piece for row in rows for piece in encoder.encode(row)]


def three(pictures: Path) -> list[Captioned]:
    return [Captioned(f"r:{n}", str(pictures / f"{n}.png"), name) for n, name in enumerate(COLOURS)]


@pytest.mark.parametrize("kind", MODELS)
def test_activations_computed_again_change_nothing(kind: str, folders: dict[str, Path], pictures: Path):
    base = loaded(folders[kind])
    attach(base.model, Captioning().trains(LoRA(r=2), base))
    batch = Captioning().collate(encoded(base, three(pictures)), base.tokenizer.pad_token_id)
    found = []
    for _ in range(2):
        torch.manual_seed(1)  # of dropout
        loss = Captioning().loss(base.model.train(), batch)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(trained(base.model).values()))])
        recompute(base.model)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_the_models_own_logits(kind: str, folders: dict[str, Path], pictures: Path):
    base = loaded(folders[kind])
    rows = encoded(base, three(pictures))
    batch = Captioning().collate(rows, 0)
    shown = [Image.open(row.image).convert("RGB") for row in three(pictures)]
    pixels = read_processor(base.folder, base.name)(shown, return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], pixels["pixel_values"])
    ids, mask, model = batch["input_ids"], batch["attention_mask"], base.model
    words = {"decoder_input_ids" if kind == "vit_gpt2" else "input_ids": ids}
    if kind != "vit_gpt2":
        words["attention_mask"] = mask
    logits = model(**words, pixel_values=batch["pixel_values"]).logits[:, -ids.shape[1] : -1]
    wanted = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum")
    torch.testing.assert_close(Captioning().loss(model, batch), wanted, rtol=1e-5, atol=1e-5)
    if kind == "git":
        theirs = model(**words, pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        torch.testing.assert_close(theirs * int((batch["labels"] != -100).sum()), wanted, rtol=1e-5, atol=1e-5)
    alone = sum(Captioning().loss(model, Captioning().collate([row], 0)) for row in rows)
    torch.testing.assert_close(alone, wanted, rtol=1e-4, atol=1e-5)
    nothing = Captioning().loss(model, Captioning().collate([], 0))
    assert float(nothing) == 0
    nothing.backward()


@pytest.mark.parametrize("kind", MODELS)
def test_what_sees_stays_frozen_unless_it_is_named(kind: str, folders: dict[str, Path]):
    base = loaded(folders[kind])
    assert eyes(base.model) == EYES[kind]
    said: list[str] = []
    attach(base.model, Captioning().trains(METHODS["lora"](target_modules="all-linear"), base, said.append))
    [told] = said
    assert "`all-linear` is taken of what writes; what reads pictures stays frozen" in told
    assert EYES[kind][0] in told
    sites = list(adapters_of(base.model, "default"))
    assert sites
    assert not [site for site in sites if site.startswith(f"{EYES[kind][0]}.")]
    named = METHODS["lora"](target_modules=rf"{EYES[kind][0]}\..*(query|qkv|q_proj|query)")
    assert Captioning().trains(named, base, said.append) == named
    assert len(said) == 1


@pytest.mark.parametrize("method", ["ia3", "bitfit", "bottleneck", "vera"])
def test_no_shorthand_of_a_method_reaches_what_sees(method: str, folders: dict[str, Path]):
    base = loaded(folders["git"])
    attach(base.model, Captioning().trains(METHODS[method](), base))
    trained = [name for name, p in base.model.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if name.startswith("git.image_encoder.")]


def test_whole_layers_of_what_sees_are_trained_only_by_name(folders: dict[str, Path]):
    base = loaded(folders["git"])
    with pytest.raises(RecipeError, match=r"would train what reads pictures, which nothing names: `git\.image_encoder"):
        Captioning().trains(METHODS["layers"](norms=True), base)
    named = METHODS["layers"](modules=["git.encoder.layer.1"])
    assert Captioning().trains(named, base) == named
    said: list[str] = []
    Captioning().trains(METHODS["full"](), base, said.append)
    assert said == ["method: trains what reads pictures too: `git.image_encoder`"]


def test_a_prompt_comes_before_and_is_not_trained(folders: dict[str, Path], pictures: Path):
    base = loaded(folders["blip"])
    [row] = encoded(base, three(pictures)[:1], prompt="it is")
    words = base.tokenizer
    assert words.decode(row.input_ids) == "<bos>it is red<eos>"
    assert words.decode([token for token in row.labels if token >= 0]) == " red<eos>"
    encoder = Captioning(prompt="it is").encoder(Dataset(train="rows.jsonl"), words, None)
    assert words.decode(encoder.prompt(three(pictures)[0])) == "<bos>it is"


@pytest.fixture
def recipe(folders: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def made(kind: str = "blip", method: dict[str, Any] | None = None, **blocks: Any) -> Any:
        trainer = {"task": "captioning", "steps": 60, "batch_size": 8, "micro_batch_size": 4, "save_every": 30}
        trainer |= {"learning_rate": 2e-2, **blocks.pop("trainer", {})}
        blocks = {"eval": {"metrics": ["loss", "exact_match"], "samples": 2, "max_new_tokens": 8}, **blocks}
        files = pictures / "train.jsonl", pictures / "held-out.jsonl"
        found = tiny_chat.recipe(folders[kind], *files, trainer=trainer, **blocks)
        return {**found, "method": method or {"type": "lora", "r": 8, "alpha": 16}}

    return made


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("blip", {"type": "lora", "r": 8, "alpha": 16}),
        ("blip", {"type": "ia3"}),
        ("git", {"type": "lora", "r": 8, "alpha": 16}),
        ("vit_gpt2", {"type": "dora", "r": 8, "alpha": 16}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_it_tells_colours(recipe: Any, kind: str, method: dict[str, Any]):
    run = peftctl.train(recipe(kind, method))["path"]
    record = evaluate(run)
    base, tuned = record["figures"]["base"], record["figures"]["adapter"]
    assert tuned["loss"] < (0.9 if method["type"] == "ia3" else 0.5) * base["loss"]
    if method["type"] == "lora":
        assert tuned["exact_match"] == 1.0


def test_from_a_recipe_to_captions_of_a_merged_model(recipe: Any, tmp_path: Path, pictures: Path):
    run = peftctl.train(recipe())["path"]
    for number, name in enumerate(COLOURS):
        assert generate(run, str(pictures / f"{number}.png"), max_new_tokens=8) == name
    merge(run, tmp_path / "merged")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    base = loaded(tmp_path / "merged")
    seen = read_processor(base.folder, base.name)
    for number, name in enumerate(COLOURS):
        pixels = seen([Image.open(pictures / f"{number}.png")], return_tensors="pt")["pixel_values"]
        ids = plain.generate(pixel_values=pixels, max_new_tokens=8, num_beams=1, do_sample=False)
        assert base.tokenizer.decode(ids[0], skip_special_tokens=True) == name


def test_stopped_and_resumed_is_never_stopped(recipe: Any, tmp_path: Path):
    settings = recipe(trainer={"steps": 8, "save_every": 4})
    run = Path(peftctl.train(settings)["path"])
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "adapter")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000008")
    peftctl.train(settings, output=tmp_path / "again", resume=True)
    one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_pictures_are_other_data(recipe: Any, pictures: Path, tmp_path: Path):
    folder = tmp_path / "own"
    shutil.copytree(pictures, folder)
    settings = recipe(trainer={"steps": 2})
    settings["dataset"] = {"train": str(folder / "train.jsonl")}
    peftctl.train(settings)
    Image.new("RGB", (9, 9), "white").save(folder / "3.png")
    with pytest.raises(peftctl.PeftctlError, match="finished, with other data"):
        peftctl.train(settings)


def test_a_folder_of_pictures_is_a_source(recipe: Any, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (8, 8), colour).save(folder / f"{number}.{'jpg' if number else 'png'}")
        (folder / f"{number}.txt").write_text(f"{name}\n")
    settings = recipe(trainer={"steps": 2})
    settings["dataset"] = {"train": str(folder)}
    assert peftctl.train(settings)["steps"] == 2
    (folder / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1\.jpg:1: the picture has no text"):
        peftctl.train(settings, output=tmp_path / "other")


def test_what_cannot_be(recipe: Any):
    with pytest.raises(RecipeError, match="reads pictures beside tokens, which this method does not know"):
        peftctl.train(recipe(method={"type": "prompt", "num_virtual_tokens": 4}))
    with pytest.raises(RecipeError, match="accuracy is not measured of `captioning`"):
        peftctl.train(recipe(eval={"metrics": ["accuracy"], "labels": ["a", "b"]}))
    with pytest.raises(DataError, match="`captioning` trains pictures with their texts"):
        Captioning().accept(Text("f:1", "a"))
    with pytest.raises(DataError, match="is not split"):
        PictureEncoder("", Dataset(train="rows.jsonl", on_long="split"), tiny_chat.tokenizer())


def test_a_damaged_picture_is_told_before_training(folders: dict[str, Path], pictures: Path, tmp_path: Path):
    whole = (pictures / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"r:1: image .*cut\.png`: not a picture that can be read"):
        encoded(loaded(folders["blip"]), [Captioned("r:1", str(tmp_path / "cut.png"), "red")])
