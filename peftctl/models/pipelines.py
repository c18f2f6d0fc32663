"""The pipelines of diffusers that can be trained: of what parts each consists, and how its network is asked.

The network predicts noise, or what stands for it, from a noisy picture, a timestep and what the text encoders made of a
prompt, its conditions: tensors [rows, ...] by the name that the network, or its `added_cond_kwargs`, gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Conditions = dict[str, Tensor]

FLOW = "FlowMatchEulerDiscreteScheduler"
"""The one scheduler here that is of flow matching."""

VAE = {"vae": ("AutoencoderKL",)}
CLIP, CLIP_PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
CLIP_WORDS, T5_WORDS = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")


@dataclass(frozen=True)
class Kind:
    """One pipeline of diffusers."""

    pipeline: str
    """Its class."""
    network: str
    """The part that is trained."""
    parts: Mapping[str, tuple[str, ...]]
    """Part -> the classes that it may be of, beside the scheduler."""
    conditions: Callable[[Any, Sequence[str], torch.device], Conditions]
    """From the pipeline, whose text encoders are on the device, and texts."""
    tokens: int = 77
    """How many of a text its encoders read."""
    flow: bool = False
    """Whether its scheduler is one of flow matching."""
    optional: tuple[str, ...] = field(default=("safety_checker", "feature_extractor", "image_encoder"))
    """Parts that neither training nor drawing needs."""

    @property
    def encoders(self) -> list[str]:
        """The parts that read texts."""
        return [part for part in self.parts if part.startswith("text_encoder")]


def clip(pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditions:
    embeddings, _ = pipeline.encode_prompt(list(texts), device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings}


def two_clips(pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditions:
    embeddings, _, pooled, _ = pipeline.encode_prompt(list(texts), device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings, "text_embeds": pooled}


def three_encoders(pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditions:
    thrice = (list(texts),) * 3
    embeddings, _, pooled, _ = pipeline.encode_prompt(*thrice, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def t5(tokens: int) -> Callable[[Any, Sequence[str], torch.device], Conditions]:
    """Of so many tokens."""

    def conditions(pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditions:
        embeddings, mask, _, _ = pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, device=device, max_sequence_length=tokens
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    return conditions


def pixart(name: str, tokens: int) -> Kind:
    parts = {"transformer": ("PixArtTransformer2DModel",), "text_encoder": ("T5EncoderModel",), "tokenizer": T5_WORDS}
    return Kind(name, "transformer", VAE | parts, t5(tokens), tokens)


UNET = {"unet": ("UNet2DConditionModel",)}

KINDS = {
    kind.pipeline: kind
    for kind in (
        Kind("StableDiffusionPipeline", "unet", VAE | UNET | {"text_encoder": (CLIP,), "tokenizer": CLIP_WORDS}, clip),
        Kind(
            "StableDiffusionXLPipeline",
            "unet",
            VAE
            | UNET
            | {"text_encoder": (CLIP,), "tokenizer": CLIP_WORDS}
            | {"text_encoder_2": (CLIP_PROJECTED,), "tokenizer_2": CLIP_WORDS},
            two_clips,
        ),
        pixart("PixArtAlphaPipeline", 120),
        pixart("PixArtSigmaPipeline", 300),
        Kind(
            "StableDiffusion3Pipeline",
            "transformer",
            VAE
            | {"transformer": ("SD3Transformer2DModel",)}
            | {"text_encoder": (CLIP_PROJECTED,), "tokenizer": CLIP_WORDS}
            | {"text_encoder_2": (CLIP_PROJECTED,), "tokenizer_2": CLIP_WORDS}
            | {"text_encoder_3": ("T5EncoderModel",), "tokenizer_3": T5_WORDS},
            three_encoders,
            flow=True,
        ),
    )
}
"""By class, as `model_index.json` has it."""


def kind_of(pipeline: Any) -> Kind:
    """That of a pipeline in memory."""
    return KINDS[type(pipeline).__name__]


ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
"""Conditions that a network takes in its `added_cond_kwargs`."""


def of_picture(network: Any, size: tuple[int, int], corner: tuple[int, int], resolution: int) -> Conditions:
    """What a network reads of a picture itself: its height and width, and the corner of the square cut out of it."""
    if getattr(network.config, "addition_embed_type", None) == "text_time":  # SDXL
        return {"time_ids": torch.tensor([*size, *corner, resolution, resolution], dtype=torch.float32)}
    if getattr(network, "use_additional_conditions", False):  # PixArt-alpha of 1024
        return {
            "resolution": torch.tensor([resolution, resolution], dtype=torch.float32),
            "aspect_ratio": torch.ones(1),
        }
    return {}


def predict(model: nn.Module, sample: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """What the network, perhaps wrapped for several processes, makes of noisy latents [rows, channels, height, width].

    The prediction has the shape of `sample`; of a network that learned the variance too, that is left out.
    """
    kind = type(getattr(model, "module", model)).__name__
    plain: dict[str, Any] = {name: value for name, value in conditions.items() if name not in ADDED}
    added: dict[str, Any] = {name: value for name, value in conditions.items() if name in ADDED}
    if kind == "PixArtTransformer2DModel":
        added = {"resolution": None, "aspect_ratio": None} | added
    if kind != "SD3Transformer2DModel":
        plain["added_cond_kwargs"] = added
    # its keyword for the picture is the only other one that differs
    first = "sample" if kind == "UNet2DConditionModel" else "hidden_states"
    predicted: Tensor = model(**{first: sample}, timestep=timestep, **plain, return_dict=False)[0]
    return predicted[:, : sample.shape[1]]


def blank(network: Any) -> tuple[Tensor, Tensor, Conditions]:
    """The smallest input that the network takes: latents, timestep and conditions of one row."""
    config = network.config
    side = 8 * getattr(config, "patch_size", 1)
    sample, timestep = torch.zeros(1, config.in_channels, side, side), torch.zeros(1)
    width = {
        "UNet2DConditionModel": "cross_attention_dim",
        "PixArtTransformer2DModel": "caption_channels",
        "SD3Transformer2DModel": "joint_attention_dim",
    }[type(network).__name__]
    conditions = {"encoder_hidden_states": torch.zeros(1, 1, config[width])}
    if "pooled_projection_dim" in config:
        conditions["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim)
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditions["text_embeds"] = torch.zeros(1, pooled)
    named = of_picture(network, (side, side), (0, 0), side)
    return sample, timestep, conditions | {name: value[None] for name, value in named.items()}


KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "runwayml/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "CompVis/stable-diffusion-v1-4": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-2-1": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-2-1-base": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "PixArt-alpha/PixArt-XL-2-512x512": "PixArtAlphaPipeline",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "PixArtAlphaPipeline",
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "PixArtSigmaPipeline",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "PixArtSigmaPipeline",
    "stabilityai/stable-diffusion-3-medium-diffusers": "StableDiffusion3Pipeline",
    "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
    "stabilityai/stable-diffusion-3.5-large": "StableDiffusion3Pipeline",
}
"""Pipelines of the hub by their ids, so that they can be imitated without a network."""
