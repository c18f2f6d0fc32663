"""Pictures by their texts: the loss is a hand-written step's of diffusers and peft, what is seen is no accident."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from PIL import Image
from tiny_pictures import PIPELINES, SIDE, load_pipeline, write_pictures
from torch import Tensor

from peftctl.data.batches import Layout
from peftctl.data.dataset import Dataset
from peftctl.data.formats import Captioned, Text
from peftctl.data.prepare import prepare
from peftctl.engine.attach import attach, trained
from peftctl.engine.disk import save
from peftctl.errors import DataError, ModelError
from peftctl.methods import METHODS
from peftctl.models.base import Base
from peftctl.models.tiny_pipeline import write_pipeline
from peftctl.tasks.latents import MEASURED, Pictured
from peftctl.tasks.noising import Noising, generator
from peftctl.tasks.squares import square
from peftctl.tasks.text_to_image import TextToImage

SEED, STEP = 3, 17


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    made = {name: write_pipeline(name, folder / name) for name in PIPELINES}
    return made | {"v": write_pipeline(PIPELINES[0], folder / "v", prediction="v_prediction")}


def rows_of(task: TextToImage, base: Base, pictures: Path) -> Any:
    dataset = Dataset(train=str(pictures), format="image_text")
    prepared = prepare(dataset.train, dataset, base.tokenizer, Path("."), keep_parsed=True, reading=task.reading)
    return task.rows(prepared, base)


def by_hand(base: Base, pipeline: Any, pictures: Path, number: int, text: str, gamma: float | None) -> Tensor:
    """The loss of one picture as diffusers' training scripts compute it, with the chance that is ours."""
    kind = type(pipeline).__name__
    picture = Image.open(pictures.parent / f"{number}.png")
    scale = SIDE / min(picture.size)
    size = [round(side * scale) for side in picture.size]
    left, top = ((side - SIDE) // 2 for side in size)
    cut = picture.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1
    chance = generator(SEED, STEP, number)
    torch.randint(1, (1,), generator=chance)  # which view
    flow = kind == "StableDiffusion3Pipeline"
    if flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        step = (torch.sigmoid(torch.randn(1, generator=chance)) * 1000).long()
    else:
        scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        step = torch.randint(1000, (1,), generator=chance)
    vae = pipeline.vae
    latents = vae.encode(pixels).latent_dist
    shape = latents.mean.shape[1:]
    x = latents.mean + latents.std * torch.randn(shape, generator=chance)
    x = (x - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    noise = torch.randn(shape, generator=chance)[None]
    if flow:
        embeddings, _, pooled, _ = pipeline.encode_prompt(text, text, text, do_classifier_free_guidance=False)
        sigma = scheduler.sigmas[step]
        predicted = pipeline.transformer(
            hidden_states=(1 - sigma) * x + sigma * noise,
            timestep=scheduler.timesteps[step],
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
        ).sample
        return F.mse_loss(predicted, noise - x)
    noisy = scheduler.add_noise(x, noise, step)
    if kind == "PixArtAlphaPipeline":
        embeddings, mask, _, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
        given = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "timestep": step}
        added = {"resolution": None, "aspect_ratio": None}
        predicted = pipeline.transformer(noisy, **given, added_cond_kwargs=added).sample.chunk(2, dim=1)[0]
    elif kind == "StableDiffusionXLPipeline":
        embeddings, _, pooled, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
        ids = torch.tensor([[picture.size[1], picture.size[0], top, left, SIDE, SIDE]])
        added = {"text_embeds": pooled, "time_ids": ids}
        predicted = pipeline.unet(noisy, step, embeddings, added_cond_kwargs=added).sample
    else:
        ids = pipeline.tokenizer(
            text, padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        predicted = pipeline.unet(noisy, step, pipeline.text_encoder(ids)[0]).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    loss = F.mse_loss(predicted, scheduler.get_velocity(x, noise, step) if velocity else noise)
    if gamma is None:
        return loss
    snr = compute_snr(scheduler, step)
    weight = torch.stack([snr, gamma * torch.ones_like(step)], dim=1).min(dim=1)[0]
    return loss * (weight / (snr + 1) if velocity else weight / snr)[0]


@pytest.mark.parametrize(
    ("name", "gamma"), [(name, None) for name in (*PIPELINES, "v")] + [(PIPELINES[0], 5.0), ("v", 5.0)]
)
def test_loss_and_gradients_are_those_of_a_step_with_diffusers_and_peft(
    name: str, gamma: float | None, pipelines: dict[str, Path], pictures: Path, tmp_path: Path
):
    base = load_pipeline(pipelines[name])
    task = TextToImage(resolution=SIDE, min_snr_gamma=gamma)
    rows = rows_of(task, base, pictures)
    attach(base.model, METHODS["lora"](r=4, alpha=8, target_modules="attention"))
    torch.manual_seed(0)
    for parameter in trained(base.model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save(base.model, tmp_path / "adapter")
    seen = task.seen(rows, SEED, STEP)
    batch = task.collate([seen[i] for i in range(len(seen))], 0)
    ours = task.sums(base.model, batch)["loss"] / len(seen)
    ours.backward()

    theirs = load_pipeline(pipelines[name])
    network = peft.PeftModel.from_pretrained(theirs.model, tmp_path / "adapter", is_trainable=True)
    losses = [by_hand(theirs, theirs.pipeline, pictures, i, f"a red thing {i}", gamma) for i in range(len(seen))]
    wanted = torch.stack(losses).mean()
    wanted.backward()
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), abs=1e-4)
    gradients = {key.replace(".default", ""): p.grad for key, p in network.named_parameters() if p.grad is not None}
    mine = {key.replace(".adapters.default", ""): p.grad for key, p in trained(base.model).items()}
    assert {f"base_model.model.{key}" for key in mine} == gradients.keys()
    for key, gradient in mine.items():
        assert torch.allclose(gradient, gradients[f"base_model.model.{key}"], atol=1e-4), key


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_is_added_as_diffusers_adds_it(prediction: str):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    x, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    for step in (0, 1, 500, 999):
        one = Noising(scheduler, 5.0).noisy(x[0], noise[0], step)
        number = torch.tensor([step])
        assert torch.allclose(one.sample, scheduler.add_noise(x, noise, number)[0], atol=1e-6)
        wanted = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, number), "sample": x}
        assert torch.allclose(one.target, wanted[prediction][0], atol=1e-6)
        snr = float(compute_snr(scheduler, number))
        least = {"epsilon": min(snr, 5) / snr, "v_prediction": min(snr, 5) / (snr + 1), "sample": min(snr, 5)}
        assert one.weight == pytest.approx(least[prediction], rel=1e-4)


def same(one: Pictured, other: Pictured) -> bool:
    pairs = zip(one.noisy, other.noisy, strict=True)
    return all(torch.equal(a.sample, b.sample) and int(a.timestep) == int(b.timestep) for a, b in pairs)


def test_what_is_seen_depends_on_seed_step_and_row_alone(pipelines: dict[str, Path], pictures: Path):
    base, task = load_pipeline(pipelines[PIPELINES[0]]), TextToImage(resolution=SIDE, flip=True)
    rows = rows_of(task, base, pictures)
    first = task.seen(rows, 0, 4)
    torch.manual_seed(99)
    again = task.seen(rows_of(task, base, pictures), 0, 4)
    assert all(same(first[i], again[i]) for i in (3, 1, 0))
    assert not same(first[0], task.seen(rows, 0, 5)[0])
    assert not same(first[0], task.seen(rows, 1, 4)[0])
    assert len(rows[0].noisy) == MEASURED
    assert [int(one.timestep) for one in rows[0].noisy] == [125, 375, 625, 875]
    assert same(rows[2], rows_of(task, base, pictures)[2])
    weighted = TextToImage(resolution=SIDE, flip=True, min_snr_gamma=0.1)
    other = rows_of(weighted, base, pictures)
    assert same(rows[2], other[2])
    assert [one.weight for one in other[2].noisy] == [1.0] * MEASURED
    assert min(weighted.seen(other, 0, 4)[i].noisy[0].weight for i in range(len(other))) < 1
    assert len(first[0].noisy) == 1


def test_half_of_the_draws_see_the_mirror_image(pipelines: dict[str, Path], pictures: Path):
    base, task = load_pipeline(pipelines[PIPELINES[0]]), TextToImage(resolution=SIDE, flip=True)
    rows = rows_of(task, base, pictures)
    views = rows.encoded[0].views
    assert len(views) == 2
    pixels, _, _ = square(Image.open(pictures.parent / "0.png"), SIDE)
    mirrored = base.pipeline.vae.encode(pixels.flip(-1)[None]).latent_dist.mean[0]
    assert torch.allclose(views[1].mean, mirrored, atol=1e-6)
    drawn = [int(torch.randint(2, (1,), generator=generator(0, step, 0))) for step in range(200)]
    assert 70 < sum(drawn) < 130


def test_micro_batches_change_nothing(pipelines: dict[str, Path], pictures: Path):
    base, task = load_pipeline(pipelines[PIPELINES[0]]), TextToImage(resolution=SIDE)
    rows = task.seen(rows_of(task, base, pictures), 0, 0)
    layouts = [Layout(rows, size, 0, collate=task.collate) for size in (1, 2, 5)]
    with torch.no_grad():
        sums = [
            sum(
                float(task.loss(base.model, layout.batch(part, base.device))) for part in layout.micro_batches(range(5))
            )
            for layout in layouts
        ]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_rank_without_rows_takes_part_with_a_gradient_of_zero(name: str, pipelines: dict[str, Path]):
    base, task = load_pipeline(pipelines[name]), TextToImage(resolution=SIDE)
    attach(base.model, METHODS["lora"](target_modules="attention"))
    batch = task.collate([], 0)
    task.sums(base.model, batch)["loss"].backward()
    gradients = [parameter.grad for parameter in trained(base.model).values()]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_network_of_two_bytes_is_told_the_timestep_as_it_is(pipelines: dict[str, Path], pictures: Path):
    base, task = load_pipeline(pipelines["StableDiffusion3Pipeline"]), TextToImage(resolution=SIDE)
    base.model.to(torch.bfloat16)
    rows = task.seen(rows_of(task, base, pictures), SEED, STEP)
    batch = task.collate([rows[0]], 0)
    told: list[Tensor] = []
    base.model.time_text_embed.register_forward_pre_hook(lambda module, given: told.append(given[0]))
    task.sums(base.model, batch)
    assert torch.equal(told[0], batch["timestep"])
    assert not torch.equal(told[0], told[0].bfloat16().float())


def test_a_square_is_cut_out_of_the_middle():
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste((0, 0, 255), (10, 0, 30, 20))
    pixels, size, corner = square(picture, 10)
    assert (pixels.shape, size, corner) == ((3, 10, 10), (20, 40), (0, 5))
    assert pixels[:, 5, 5].tolist() == [-1, -1, 1]


def test_captions_are_cut_to_what_the_encoder_reads(pipelines: dict[str, Path]):
    base = load_pipeline(pipelines[PIPELINES[0]])
    row = Captioned("rows.jsonl:1", "a.png", "abcdefghij " * 10)
    encoder = TextToImage().encoder(Dataset(train="x"), base.tokenizer, None)
    [encoded] = encoder.encode(row)
    assert (len(encoded), encoded.truncated, TextToImage().weight(encoded)) == (77, True, 1)
    assert encoded.cut > 0
    assert TextToImage().encoder(Dataset(train="x", on_long="drop"), base.tokenizer, None).encode(row) == []
    with pytest.raises(DataError, match=r"^rows.jsonl:1: \d+ tokens of text, and the model reads 77"):
        TextToImage().encoder(Dataset(train="x", on_long="error"), base.tokenizer, None).encode(row)
    with pytest.raises(DataError, match="is not split"):
        TextToImage().encoder(Dataset(train="x", on_long="split"), base.tokenizer, None)


def test_rows_without_a_text_take_the_prompt():
    row = Captioned("rows.jsonl:1", "a.png", " ")
    assert TextToImage(prompt="sks").accept(row) == replace(row, text="sks")
    assert TextToImage(prompt="sks").accept(replace(row, text="a cat")).text == "a cat"
    with pytest.raises(DataError, match=r"^rows.jsonl:1: the picture has no text"):
        TextToImage().accept(row)
    with pytest.raises(DataError, match="trains pictures, which this row has not"):
        TextToImage().accept(Text("rows.jsonl:1", "a cat"))


@pytest.mark.parametrize("name", ["prompt", "prefix", "p_tuning", "reft"])
def test_methods_that_act_on_tokens_are_refused(name: str):
    what, hint = TextToImage().refuses(METHODS[name]()) or ("", "")
    assert "acts on tokens" in what
    assert "lora" in hint


def test_settings_that_the_pipeline_has_not_are_refused(pipelines: dict[str, Path]):
    base = load_pipeline(pipelines[PIPELINES[0]])
    with pytest.raises(ModelError, match="resolution: 60 is no multiple of 8"):
        TextToImage(resolution=60).frozen(base)
    assert TextToImage().frozen(base).resolution == 64
    with pytest.raises(ModelError, match="min_snr_gamma: a model of flow matching"):
        TextToImage(min_snr_gamma=5).frozen(load_pipeline(pipelines["StableDiffusion3Pipeline"]))
    odd = copy.deepcopy(base.pipeline.scheduler)
    odd.register_to_config(prediction_type="score")
    with pytest.raises(ModelError, match="prediction_type: `score` is not trained here"):
        TextToImage().frozen(replace(base, pipeline=SimpleNamespace(scheduler=odd)))
