"""`peftctl generate` of a model that draws: a picture in a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from peftctl.errors import RunError
from peftctl.methods import load
from peftctl.models import base as models
from peftctl.models.diffusion import quiet_diffusers
from peftctl.models.head import DIFFUSION
from peftctl.models.quiet import Say
from peftctl.training import storage
from peftctl.verbs.target import Target

CLEAN = {"PixArtAlphaPipeline": {"clean_caption": False}, "PixArtSigmaPipeline": {"clean_caption": False}}
"""Texts are drawn as they were trained: PixArt's would be changed by packages that not everybody has."""


@torch.no_grad()
def draw(found: Target, text: str, output: Path | None, *, base: bool, seed: int, say: Say) -> str:
    """Draw `text` as the pipeline does when nothing else is said; returns the path of the PNG.

    Raises RunError without a name for it, and what loading raises.
    """
    if output is None or output.suffix.lower() != ".png":
        raise RunError(f"`--output`: {'missing' if output is None else output}", "name the picture: `--output cat.png`")
    loaded = models.load(found.model, DIFFUSION, say=say)
    if found.adapter is not None and not base:
        load(loaded.model, found.adapter)
    pipeline = loaded.pipeline
    more: dict[str, Any] = CLEAN.get(type(pipeline).__name__, {})
    with quiet_diffusers():
        pipeline.to(loaded.device)
        pipeline.vae.to(loaded.dtype)  # it is handed latents of the network
        picture = pipeline(text, generator=torch.Generator().manual_seed(seed), **more).images[0]
    content = io.BytesIO()
    picture.save(content, format="PNG")
    storage.replace_atomically(output, content.getvalue())
    return str(output)
