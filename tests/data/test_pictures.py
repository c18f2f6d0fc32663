"""Pictures that rows name: found beside their rows, looked at before training, read as RGB whatever they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
from PIL import Image

from peftctl.data.dataset import Dataset, Source
from peftctl.data.examples import readable
from peftctl.data.file import Row
from peftctl.data.formats import Captioned, check, guess
from peftctl.data.pictures import MOST, located, rgb
from peftctl.data.sources import read
from peftctl.errors import DataError


def row(image: str | bytes, place: str = "data/rows.jsonl:3") -> Captioned:
    return Captioned(place, image, "a text")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data" / "more").mkdir(parents=True)
    Image.new("RGB", (6, 4), "red").save(tmp_path / "data" / "more" / "red.png")
    return tmp_path


def test_a_path_starts_at_the_file_of_its_row(root: Path):
    found = located(row("more/red.png"), root)
    assert found.image == str(root / "data" / "more" / "red.png")
    assert rgb(found).size == (6, 4)
    with pytest.raises(DataError, match=r"data/rows\.jsonl:3: image: no such file: `red\.png`; a path starts at"):
        located(row("red.png"), root)


def test_what_is_no_picture_is_told_with_its_row(root: Path):
    (root / "data" / "text.png").write_text("no picture")
    whole = (root / "data" / "more" / "red.png").read_bytes()
    (root / "data" / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data/rows\.jsonl:3: image `.*text\.png`: not a picture that can be read"):
        located(row("text.png"), root)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: image: not a picture that can be read"):
        located(row(b"nothing"), root)
    with pytest.raises(DataError, match=r"data/rows\.jsonl:3: image"):
        rgb(located(row("half.png"), root))
    side = int(MOST**0.5) + 1
    Image.new("1", (side, side)).save(root / "data" / "large.png")
    with pytest.raises(DataError, match="pixels, more than 64,000,000"):
        located(row("large.png"), root)


def saved(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def test_whatever_a_picture_is_it_becomes_rgb():
    gray = Image.fromarray(np.full((4, 6), 128, dtype=np.uint8))
    deep = Image.fromarray(np.full((4, 6), 128 * 256, dtype=np.uint16))
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    palette = Image.new("RGB", (6, 4), "blue").convert("P")
    for picture, wanted in [
        (gray, (128, 128, 128)),
        (deep, (128, 128, 128)),
        (clear, (255, 255, 255)),
        (palette, (0, 0, 255)),
    ]:
        made = rgb(row(saved(picture)))
        assert (made.mode, made.getpixel((0, 0))) == ("RGB", wanted)
    turned = Image.new("RGB", (6, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    assert rgb(row(saved(turned, "JPEG", exif=exif))).size == (4, 6)


def test_the_digest_hears_the_picture(root: Path):
    heard: list[bytes] = []
    located(row("more/red.png"), root, heard.append)
    located(row(b"" + (root / "data" / "more" / "red.png").read_bytes()), root, heard.append)
    assert heard == [(root / "data" / "more" / "red.png").read_bytes()] * 2


def test_a_folder_of_pictures_is_rows(root: Path):
    folder = root / "data" / "more"
    Image.new("RGB", (3, 3), "blue").save(folder / "blue.jpg")
    (folder / "blue.txt").write_text(" a blue one \n")
    rows = list(read(Source(path="data/more"), root))
    assert [(each.place, each.value["text"]) for each in rows] == [
        ("data/more/blue.jpg:1", "a blue one"),
        ("data/more/red.png:1", ""),
    ]
    found = list(readable("data/more", Dataset(train="data/more"), root))
    assert [Path(str(each.image)).name for each in found] == ["blue.jpg", "red.png"]
    tiny_chat.write_rows(folder / "metadata.jsonl", [{"file_name": "red.png", "text": "a red one"}])
    with pytest.raises(DataError, match=r"several kinds of files"):
        list(read(Source(path="data/more"), root))
    (folder / "blue.txt").unlink()
    [only] = readable("data/more", Dataset(train="data/more"), root)
    assert (only.text, Path(str(only.image)).name) == ("a red one", "red.png")


def test_a_text_with_the_name_of_its_file_is_no_picture():
    assert guess([Row("f:1", {"file_name": "main.py", "text": "print()"})]) == "text"
    assert guess([Row("f:1", {"file_name": "a/cat.JPG", "text": "a cat"})]) == "image_text"
    with pytest.raises(DataError, match="f:1: `image` is missing"):
        check(Row("f:1", {"text": "a cat"}), "image_text")
