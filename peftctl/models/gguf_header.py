"""A bounded look at a GGUF file before a library reads it, so that a damaged or hostile one ends quickly.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic `GGUF`, uint32 version, uint64
number of tensors, uint64 number of metadata entries; each entry a string key, uint32 type and value; each tensor a
string name, uint32 number of dimensions, uint64 for each of them, uint32 type, uint64 offset into the data; then the
data, aligned. A string is a uint64 length and its bytes.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from peftctl.config.quote import shown
from peftctl.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_ARRAYS = ("tokenizer.ggml.tokens",)
# several times what the largest vocabularies and models need
_MOST_ENTRIES, _MOST_TENSORS, _MOST_ITEMS, _LONGEST_STRING = 10_000, 100_000, 2_000_000, 4 * 2**20


_MOST_BEHIND = 2**20
"""Bytes that may follow the last tensor."""

_LONGEST_REASON = 200
"""Characters of what is wrong that a message shows."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    metadata: dict[str, Any]
    """Numbers and strings by key; of the arrays only `tokenizer.ggml.tokens`, a list of strings."""

    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of every tensor, fastest dimension first."""

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


class _Cursor:
    """Reads forward through the mapped file, never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes; returns where they begin."""
        if size > self.end - self.at:
            raise ValueError(f"ends inside {what}")
        self.at += size
        return self.at - size

    def number(self, form: str, what: str) -> Any:
        return struct.unpack_from("<" + form, self.data, self.take(struct.calcsize("<" + form), what))[0]

    def count(self, most: int, what: str, form: str = "Q") -> int:
        value: int = self.number(form, what)
        if value > most:
            raise ValueError(f"{what}: {value} is more than {most}")
        return value

    def string(self, what: str) -> str:
        length = self.count(_LONGEST_STRING, f"the length of {what}")
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise ValueError(f"`{key}` has unknown type {kind}")
        inner, length = self.number("I", key), self.count(_MOST_ITEMS, f"the length of {key}")
        if inner in _SCALARS:
            self.take(struct.calcsize("<" + _SCALARS[inner]) * length, key)
            return None
        if inner != _STRING:
            raise ValueError(f"`{key}` is an array of type {inner}")
        if key in _KEPT_ARRAYS:
            return [self.string(key) for _ in range(length)]
        for _ in range(length):
            self.take(self.count(_LONGEST_STRING, f"a length in {key}"), key)
        return None


def read_header(path: Path) -> Header:
    """The header of a GGUF file, checked against the size of the file.

    Raises:
        ModelError: not GGUF, big-endian, an unknown version, damaged, truncated, part of a split model.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path}: not a GGUF file", "does it hold a web page or a Git LFS pointer?")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(_Cursor(data))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        what = shown(str(error), _LONGEST_REASON)  # it quotes names of the file, of any length and any characters
        raise ModelError(f"{path}: damaged or truncated GGUF: {what}", "copy or download it again") from error
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise ModelError(f"{path}: one part of a split model", "join them with `llama-gguf-split --merge`")
    return header


def _parse(cursor: _Cursor) -> Header:
    cursor.take(4, "the magic")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise ValueError("it is big-endian" if version in (2 << 24, 3 << 24) else f"version {version} is unknown")
    tensor_count = cursor.count(_MOST_TENSORS, "the number of tensors")
    entry_count = cursor.count(_MOST_ENTRIES, "the number of metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("a key")
        value = cursor.value(cursor.number("I", key), key)
        if key in metadata:
            raise ValueError(f"`{key}` occurs twice")
        if value is not None:
            metadata[key] = value
    tensors, pieces = _tensors(cursor, tensor_count)
    reach = max((end for _, end in pieces), default=0)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ValueError(f"`general.alignment` is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    if tensors and not start + reach <= cursor.end <= start + reach + _MOST_BEHIND:
        raise ValueError(f"its tensors need {start + reach} bytes, the file has {cursor.end}")
    pieces.sort()
    if any(end > begin for (_, end), (begin, _) in pairwise(pieces)):  # a small file would become a model of any size
        raise ValueError("its tensors overlap")
    _sensible(metadata, tensor_count)
    return Header(metadata, tensors)


def _tensors(cursor: _Cursor, count: int) -> tuple[dict[str, tuple[int, ...]], list[tuple[int, int]]]:
    """Shape by name, and where each of them begins and ends in the data (bytes from its start)."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    shapes: dict[str, tuple[int, ...]] = {}
    pieces = []
    for _ in range(count):
        name = cursor.string("the name of a tensor")
        if name in shapes:
            raise ValueError(f"tensor `{name}` occurs twice")
        dimensions = cursor.count(4, f"the dimensions of {name}", "I")
        shapes[name] = tuple(cursor.number("Q", name) for _ in range(dimensions))
        kind, offset = cursor.number("I", name), cursor.number("Q", name)
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ValueError(f"tensor `{name}` has unknown type {kind}") from None
        pieces.append((offset, offset + -(-prod(shapes[name]) // block) * size))
    return shapes, pieces


def _sensible(metadata: dict[str, Any], tensors: int) -> None:
    """What a library would build a model from before it finds that the tensors do not fit."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("`general.architecture` is missing")
    layers = metadata.get(f"{architecture}.block_count", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise ValueError(f"`{architecture}.block_count` is {layers}, with {tensors} tensors")
    vocabulary = len(metadata.get("tokenizer.ggml.tokens") or ())
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        if not isinstance(metadata.get(key, 0), int) or not 0 <= metadata.get(key, 0) < max(vocabulary, 1):
            raise ValueError(f"`{key}` is {metadata[key]}, with {vocabulary} tokens")
