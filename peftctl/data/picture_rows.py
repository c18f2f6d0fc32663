"""A picture as a row: `cat.png`, and its text in `cat.txt` beside it."""

from __future__ import annotations

from collections.abc import Iterator

from peftctl.data.file import File, Row
from peftctl.errors import Problem


def record(file: File) -> Iterator[Row | Problem]:
    """The one row of a file; its text is empty where there is none beside it, which not every task takes."""
    beside = file.path.with_suffix(".txt")
    text = ""
    if beside.is_file():
        said = File(beside, str(beside), file.digest).whole()
        try:
            text = said.decode().strip()
        except UnicodeDecodeError as error:
            yield Problem(f"{beside}: not UTF-8 (byte {error.start + 1})", "save the file as UTF-8")
            return
    yield Row(f"{file.name}:1", {"image": str(file.path.absolute()), "text": text})
