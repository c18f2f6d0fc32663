"""A picture as a square of pixels: resized to its shorter side, cut out of the middle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def square(picture: Any, side: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """The middle [3, side, side] of a PIL picture in RGB, from -1 to 1; its height and width; top and left of the cut.

    The corner is that in the resized picture, as SDXL counts it.
    """
    from PIL import Image

    width, height = picture.size
    scale = side / min(width, height)
    wide, high = max(side, round(width * scale)), max(side, round(height * scale))
    left, top = (wide - side) // 2, (high - side) // 2
    cut = picture.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(cut, dtype=np.float32)).permute(2, 0, 1)
    return pixels / 127.5 - 1, (height, width), (top, left)
