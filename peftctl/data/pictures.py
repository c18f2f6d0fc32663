"""The pictures of rows: found beside the file that names them, and opened."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftctl.config.quote import quoted
from peftctl.data.formats import Captioned
from peftctl.errors import DataError

LARGEST = 200_000_000
"""Pixels: no photograph has as many, and a small file may claim to."""


def located(row: Captioned) -> Path | bytes:
    """Where the picture of a row is, a path in it being relative to the file of rows; or its bytes."""
    if isinstance(row.image, bytes):
        return row.image
    return Path(row.place.rpartition(":")[0]).parent / Path(row.image).expanduser()


def looked_at(row: Captioned) -> tuple[int, int]:
    """Width and height of a picture in pixels, from its header alone. Raises DataError where there is none to open."""
    size: tuple[int, int] = read(row, lambda picture: picture.size)
    return size


def opened(row: Captioned) -> Any:
    """The picture of a row, of PIL, upright and in RGB. Raises DataError for one that is missing or damaged."""
    from PIL import ImageOps

    return read(row, lambda picture: ImageOps.exif_transpose(picture).convert("RGB"))


def read(row: Captioned, what: Callable[[Any], Any]) -> Any:
    """What `what` makes of the picture. Raises DataError."""
    try:
        from PIL import Image
    except ImportError:
        hint = "install it: `pip install 'peftctl[vision]'`"
        raise DataError("pictures are read by `pillow`, which is not installed", hint) from None

    source = located(row)
    name = quoted(str(row.image)) if isinstance(row.image, str) else "its bytes"
    if isinstance(source, Path) and not source.is_file():
        hint = "paths are relative to the file of rows"
        raise DataError(f"{row.place}: image: {name}: no such file", hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                if picture.size[0] * picture.size[1] > LARGEST:
                    raise DataError(f"{row.place}: image: {name}: more than {LARGEST:,} pixels", "make it smaller")
                return what(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{row.place}: image: {name}: no picture, or a damaged one: {type(error).__name__}") from error
