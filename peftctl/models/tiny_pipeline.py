"""A random pipeline of diffusers, small enough to train in seconds, with tokenizers that know single letters."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from peftctl.models.diffusion import assembled, library, quiet_diffusers
from peftctl.models.pipelines import KINDS
from peftctl.models.quiet import quiet

WIDTH = 32
"""Of everything."""

LETTERS = string.ascii_lowercase + string.digits + string.punctuation

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
}
"""That of Stable Diffusion."""


def write_pipeline(named: str, folder: Path, *, seed: int = 0, prediction: str = "epsilon", width: int = WIDTH) -> Path:
    """A pipeline of the class `named` as a folder of diffusers; `prediction` is what its network predicts."""
    import torch

    diffusers, kind = library(), KINDS[named]
    with torch.random.fork_rng(devices=[]), quiet(), quiet_diffusers():
        torch.manual_seed(seed)
        parts = {name: PARTS[classes[0]](width) for name, classes in kind.parts.items()}
        if kind.network == "unet":
            parts["unet"] = unet(width, projected=len(kind.encoders) > 1)
        if kind.flow:
            parts["vae"].register_to_config(shift_factor=0.06)
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            parts["scheduler"] = diffusers.DDPMScheduler(**SCHEDULE, prediction_type=prediction)
        assembled(kind, parts).save_pretrained(folder)
    return folder


def vae(width: int) -> Any:
    """Pictures of 16 to latents of 2, as the real ones do of 512 to 64."""
    blocks = 4
    return library().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )


def unet(width: int, projected: bool = False) -> Any:
    """A UNet with attention in one of its two levels, that of SDXL where texts are `projected`."""
    added: dict[str, Any] = {}
    if projected:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": 2}
        added["projection_class_embeddings_input_dim"] = width + 6 * 8
    return library().UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=2 * width if projected else width,
        **added,
    )


def pixart(width: int) -> Any:
    """PixArt with the variance learned."""
    return library().PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=width // 8,
        caption_channels=2 * width,
        cross_attention_dim=width,
        in_channels=4,
        out_channels=8,
    )


def sd3(width: int) -> Any:
    """The DiT of Stable Diffusion 3, for latents of four channels."""
    return library().SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=width // 8,
        joint_attention_dim=2 * width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * width,
    )


def clip(width: int, projected: bool = False) -> Any:
    """CLIP's text encoder."""
    import transformers

    words = clip_words(width)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return transformers.CLIPTextModelWithProjection(config) if projected else transformers.CLIPTextModel(config)


def clip_words(width: int) -> Any:
    """A token a letter."""
    import transformers

    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5(width: int) -> Any:
    """T5's encoder, as wide as two of CLIP side by side."""
    import transformers

    config = transformers.T5Config(
        vocab_size=256, d_model=2 * width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    return transformers.T5EncoderModel(config)


def t5_words(width: int) -> Any:
    """A token a letter."""
    import transformers

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


PARTS = {
    "AutoencoderKL": vae,
    "UNet2DConditionModel": unet,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": lambda width: clip(width, projected=True),
    "CLIPTokenizer": clip_words,
    "T5EncoderModel": t5,
    "T5Tokenizer": t5_words,
}
"""What makes a part of a class."""
