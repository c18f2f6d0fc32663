"""Pictures that rows name, or hold as bytes: found beside their rows, looked at, and read as RGB."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.config.quote import shown
from peftctl.data.file import Digest
from peftctl.data.formats import Captioned
from peftctl.errors import DataError, RunError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""What pictures come as. Others have readers that start programs (EPS), or that nobody has looked at for long."""

MOST = 64_000_000
"""Pixels of the largest picture: a small file may unpack to any size."""


def located(row: Captioned, root: Path, digest: Digest | None = None) -> Captioned:
    """The row with its picture found and looked at, without reading all of it; a path starts at the file of its row.

    `digest` is fed the picture's bytes. Raises DataError at the row for a picture that is not there, or is none.
    """
    if isinstance(row.image, str):
        path = beside(row.image, root / Path(row.place.rpartition(":")[0]).parent, row.place)
        if not os.path.isfile(path):
            text = f"{row.place}: image: no such file: `{shown(row.image, 200)}`"
            raise DataError(text, "a path starts at the folder of the file of rows")
        row = replace(row, image=str(path))
    with opened(row) as picture:
        width, height = picture.size
    if width * height > MOST:
        text = f"{row.place}: image: {width:,} x {height:,} pixels, more than {MOST:,}"
        raise DataError(text, "make it smaller: models see a few hundred pixels a side")
    if digest is not None:
        digest(row.image if isinstance(row.image, bytes) else Path(row.image).read_bytes())
    return row


def beside(image: str, folder: Path, place: str) -> Path:
    """The path of the picture `image` of a row, which has to lie in the folder of its file or below it.

    Rows may be a stranger's, and pictures end up where others can see them. A picture that is a row itself, of a
    folder of pictures, has its own path. Raises DataError.
    """
    path = folder / image
    own = place == f"{image}:1" or Path(place.removesuffix(":1")).absolute() == path
    try:
        inside = own or path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name with a NUL, or too long; links in a circle
        inside = True  # and then it is no file
    if not inside:
        text = f"{place}: image: `{shown(image, 200)}` does not lie below the folder of the file of rows"
        raise DataError(text, "move the pictures there, and write their paths from there")
    return path


def rgb(row: Captioned) -> Image:
    """The picture of a row [height, width, RGB], turned as its camera was held, on white where it is transparent.

    Raises DataError at the row for a damaged one.
    """
    from PIL import Image, ImageOps

    with opened(row) as found:
        picture = ImageOps.exif_transpose(found)
        if picture.mode in ("I;16", "I", "F"):  # 16 bits: the upper 8
            picture = picture.convert("I").point(lambda value: value / 256).convert("L")
        if "A" in picture.getbands() or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        whole: Image.Image = picture.convert("RGB")
    return whole


@contextmanager
def opened(row: Captioned) -> Iterator[Any]:
    """The picture as PIL opens it. What goes wrong while it is read is raised as DataError."""
    try:
        from PIL import Image
    except ImportError:
        hint = "install it: `pip install 'peftctl[vision]'`"
        raise RunError("pictures are read by Pillow, which is not installed", hint) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its size is looked at above
            source = io.BytesIO(row.image) if isinstance(row.image, bytes) else row.image
            Image.init()
            with Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN]) as picture:
                yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        which = "" if isinstance(row.image, bytes) else f" `{row.image}`"
        what = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{row.place}: image{which}: not a picture that can be read: {what}") from None
