"""`.txt` and `.md` files: a row `{"text": ...}` for each document, paragraph or line.

UTF-8. A line break is `\\n` in the rows, whatever it is in the file; a row's place is the line it starts at.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftctl.data.dataset import SampleBy
from peftctl.data.file import MAX_BYTES, File, Row, not_utf8
from peftctl.errors import Problem


def samples(file: File, sample_by: SampleBy) -> Iterator[Row | Problem]:
    """The rows of a text file, and in their places those that are no text. What is blank is no row."""
    sample = _Sample(file, sample_by)
    for number, line in file.lines():
        if sample_by == "document" or line is None or line.strip():
            sample.add(number, line)
            if sample_by == "line":
                yield from sample.finish()
        else:
            yield from sample.finish()
    yield from sample.finish()


class _Sample:
    """The lines of one row, as they come; the first mistake among them is the row's."""

    def __init__(self, file: File, kind: SampleBy) -> None:
        self._file, self._kind = file, kind
        self._place: str | None = None
        self._lines: list[str] = []
        self._bytes = 0
        self._wrong: Problem | None = None

    def add(self, number: int, line: bytes | None) -> None:
        here = f"{self._file.name}:{number}"
        self._place = self._place or here
        self._bytes += MAX_BYTES + 1 if line is None else len(line)
        if self._wrong is not None:
            return
        if line is None or self._bytes > MAX_BYTES:
            hint = None if self._kind == "line" else "a smaller `sample_by` gives shorter rows: `paragraph` or `line`"
            self._wrong = Problem(f"{self._place}: the {self._kind} is longer than {MAX_BYTES // 2**20} MB", hint)
        elif b"\0" in line:
            self._wrong = Problem(f"{here}:{line.index(0) + 1}: a NUL character", "is it a text file?")
        else:
            try:
                self._lines.append(line.decode().replace("\r\n", "\n"))
            except UnicodeDecodeError as error:
                self._wrong = not_utf8(here, error)
        if self._wrong is not None:
            self._lines.clear()

    def finish(self) -> Iterator[Row | Problem]:
        text = "".join(self._lines)
        if self._wrong is not None:
            yield self._wrong
        elif self._place is not None and text.strip():
            yield Row(self._place, {"text": text if self._kind == "document" else text.removesuffix("\n")})
        self._place, self._bytes, self._wrong = None, 0, None
        self._lines.clear()
