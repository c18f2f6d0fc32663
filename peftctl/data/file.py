"""A file of rows, as readers get at it: by lines or whole, unpacked where it is a `.gz`, in bounded memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from peftctl.errors import DataError, Problem

MAX_BYTES = 16 * 2**20
"""Longest row, in bytes."""

MAX_LINE = 8 * MAX_BYTES
"""Longest line that is read to its end, in bytes: more is a device, or a small file that unpacks to any size."""

MAX_WHOLE = 512 * 2**20
"""Largest file that is read whole, in bytes, unpacked."""

_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")

Digest = Callable[[bytes], object]
"""Takes the bytes of the data as they are read, such as the `update` of a hash."""


class Row(NamedTuple):
    """One row of a source, and where it stands: `file:line`, `file.parquet:row N` or `id[split]:row`."""

    place: str
    value: dict[str, Any]


@dataclass(frozen=True)
class File:
    """A file to read rows from. `name` is what its user calls it: places start with it."""

    path: Path
    name: str
    digest: Digest | None = None
    """Is fed what is read, unpacked."""

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Number and bytes of each line with its end, without a byte order mark; None for one above `MAX_BYTES`.

        Only `\\n` and the end of the file end a line. Raises DataError when the file cannot be read or is no UTF-8.
        """
        with self.open() as stream:
            number = 0
            while line := stream.readline(MAX_BYTES + 1):
                number += 1
                self._feed(line)
                if len(line) > MAX_BYTES:
                    length = len(line)
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_BYTES)
                        self._feed(line)
                        length += len(line)
                        if length > MAX_LINE:
                            raise DataError(f"{self.name}:{number}: the line is longer than {MAX_LINE // 2**20} MB")
                    yield number, None
                    continue
                yield number, self._plain(line) if number == 1 else line

    def whole(self) -> bytes:
        """All of it, without a byte order mark. Raises DataError as `lines` does, and when it is above `MAX_WHOLE`."""
        with self.open() as stream:
            data = stream.read(MAX_WHOLE + 1)
        if len(data) > MAX_WHOLE:
            hint = "one object per line in a `.jsonl` file can be of any size"
            raise DataError(f"{self.name}: larger than {MAX_WHOLE // 2**20} MB", hint)
        self._feed(data)
        return self._plain(data)

    def feed_digest(self) -> None:
        """Feed the digest with all of it, for readers that go by the path."""
        if self.digest is not None:
            with self.open() as stream:
                while block := stream.read(2**20):
                    self.digest(block)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes, unpacked. What goes wrong while they are read is raised as DataError."""
        try:
            if self.path.name.lower().endswith(".gz"):
                with gzip.open(self.path) as stream:
                    yield cast(BinaryIO, stream)
            else:
                with self.path.open("rb") as stream:
                    yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self.name}: damaged, or not a gzip file: `{error}`") from None
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror or error}") from None

    def _feed(self, data: bytes) -> None:
        if self.digest is not None:
            self.digest(data)

    def _plain(self, start: bytes) -> bytes:
        if start[:2] in _WIDE_BOMS or b"\0" in start[:2]:
            raise DataError(f"{self.name}: not UTF-8 but UTF-16, or no text at all", "save it as UTF-8")
        return start.removeprefix(_BOM)


def not_utf8(place: str, error: UnicodeDecodeError) -> Problem:
    """The mistake of a line that is no UTF-8; the column, in bytes, goes behind its place."""
    byte = error.object[error.start]
    return Problem(f"{place}:{error.start + 1}: not UTF-8 (byte 0x{byte:02x})", "save the file as UTF-8")
