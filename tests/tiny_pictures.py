"""Small pictures in one style with texts, and tiny pipelines of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from peftctl.models import base as models
from peftctl.models.head import DIFFUSION

SIDE = 64

PIPELINES = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline"]


def write_pictures(folder: Path, number: int = 5) -> Path:
    """Blue spots on red, of different sizes, and the file of rows that names them; returns that file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(number):
        random = Random(i)
        picture = Image.new("RGB", (SIDE + 9 * i, SIDE + 4), (200, 40, 40))
        draw = ImageDraw.Draw(picture)
        for _ in range(4):
            x, y = random.randrange(SIDE), random.randrange(SIDE)
            draw.ellipse([x, y, x + 20, y + 20], fill=(20, 20, 230))
        picture.save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"a red thing {i}"})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load_pipeline(folder: Path, **settings: Any) -> models.Base:
    """A pipeline on the CPU in float32."""
    options = {"device": "cpu", "dtype": "float32", **settings}
    return models.load(models.Model(name_or_path=str(folder), **options), DIFFUSION)


def drawn(pipeline: Any, text: str = "a cat") -> Any:
    """A picture [height, width, RGB] from 0 to 1, always of the same noise."""
    import torch

    more = {"clean_caption": False, "use_resolution_binning": False} if "PixArt" in type(pipeline).__name__ else {}
    made = pipeline(
        text,
        num_inference_steps=2,
        height=SIDE,
        width=SIDE,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **more,
    )
    return torch.from_numpy(made.images[0])
