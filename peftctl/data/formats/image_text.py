"""`{"image": "cat.png", "text": "..."}`: an image and its text, which may be called `caption`.

An image is a path relative to the file of rows, or, in Parquet and on the hub, its bytes. The `metadata.jsonl` of an
imagefolder of HF datasets calls it `file_name`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Problems, kind, text_at
from peftctl.data.formats.kinds import Captioned
from peftctl.errors import Problem

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of files that are pictures."""


def read(row: Row, problems: Problems) -> Captioned:
    given = [key for key in ("text", "caption") if row.value.get(key) is not None]
    if len(given) != 1:
        what = "both `text` and `caption`" if given else "neither `text` nor `caption`"
        problems.append(Problem(f"{row.place}: {what}", "an image has one text"))
    text = text_at(row, given[0], problems, blank=True) if given else ""
    return Captioned(row.place, _image(row, problems), text)


def _image(row: Row, problems: Problems) -> str | bytes:
    image = row.value["image"]
    if isinstance(image, dict):  # as the hub's files hold images
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | bytes):
        got = kind(row.value["image"])
        problems.append(Problem(f"{row.place}: image: expected a path or the bytes of an image; got {got}"))
    elif not image.strip():
        problems.append(Problem(f"{row.place}: image: is empty"))
    return image  # type: ignore[no-any-return]


def _fits(value: Mapping[str, Any]) -> bool:
    # texts have a `file_name` too, that of the file they come from
    elsewhere = value["image"] is value.get("file_name") and not str(value["image"]).lower().endswith(ENDINGS)
    return not elsewhere and (value.get("text") is not None or value.get("caption") is not None)


IMAGE_TEXT = Form(
    name="image_text",
    required=("image",),
    optional=("text", "caption"),
    also={"file_name": "image"},
    read=read,
    fits=_fits,
)
