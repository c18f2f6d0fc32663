"""GGUF files of strangers: their counts are compared with the size of the file before anything is made of them.

llama.cpp: CVE-2024-23496, TALOS-2024-1913 to 1915, CVE-2025-49847, CVE-2025-53630, CVE-2026-27940, CVE-2026-33298; the
Python reader runs for seconds on 49 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hostile.attack import Attack

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def gguf(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_tensors: int | None = None,
    n_entries: int | None = None,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def said(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", STRING) + text(value)


def array(key: str, kind: int, length: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, kind, length) + content


def tensor(name: str, shape: Sequence[int], offset: int, kind: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


LLAMA = (said("general.architecture", "llama"), number("llama.block_count", 1))
NESTED = array("a", ARRAY, 1) + struct.pack("<IQ", ARRAY, 1) * 5_000
AB = [tensor("a", [8], 0), tensor("b", [8], 0)]
HALF = [tensor("a", [8], 0), tensor("b", [8], 16)]
DAMAGED = "damaged or truncated GGUF"

FILES = {
    "nothing": (b"", "not a GGUF file"),
    "only its name": (b"GGUF", DAMAGED),
    "a web page": (b"<html>GGUF", "not a GGUF file"),
    "entries without end": (gguf(n_entries=2**62), DAMAGED),
    "tensors without end": (gguf(n_tensors=2**62), DAMAGED),
    "entries that are not there": (gguf(n_entries=9_000), DAMAGED),
    "tensors that are not there": (gguf(LLAMA, n_tensors=90_000), DAMAGED),
    "a key without end": (gguf([text("a", 2**63)]), DAMAGED),
    "a key that overflows": (gguf([text("a", 2**64 - 1)]), DAMAGED),
    "a text without end": (gguf([text("a") + struct.pack("<I", STRING) + text("b", 2**62)]), DAMAGED),
    "an array without end": (gguf([array("a", U32, 2**40)]), DAMAGED),
    "texts without end": (gguf([array("tokenizer.ggml.tokens", STRING, 2**40)]), DAMAGED),
    "two million texts": (gguf([array("tokenizer.ggml.tokens", STRING, 2_000_000)]), DAMAGED),
    "arrays in arrays": (gguf([NESTED]), DAMAGED),
    "an array of nothing known": (gguf([array("a", 99, 10)]), DAMAGED),
    "an entry of nothing known": (gguf([text("a") + struct.pack("<I", 99)]), DAMAGED),
    "an unknown version": (gguf(LLAMA, version=99), DAMAGED),
    "the other way round": (gguf(LLAMA, version=3 << 24), "big-endian"),
    "a key twice": (gguf([*LLAMA, number("a", 1), number("a", 2)]), "occurs twice"),
    "a key of escapes": (gguf([text("\x1b[2J") + struct.pack("<I", 99)]), DAMAGED),
    "a key that is no text": (gguf([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]), DAMAGED),
    "no architecture": (gguf([number("a", 1)], [tensor("a", [8], 0)], b"\0" * 32), "architecture"),
    "layers without end": (gguf([LLAMA[0], number("llama.block_count", 2**31)], AB[:1], b"\0" * 32), "block_count"),
    "an alignment of nothing": (gguf([*LLAMA, number("general.alignment", 0)], AB[:1], b"\0" * 32), "alignment"),
    "an alignment without end": (gguf([*LLAMA, number("general.alignment", 2**31)], AB[:1], b"\0" * 32), "alignment"),
    "a tensor outside the file": (gguf(LLAMA, [tensor("a", [8], 10**6)], b"\0" * 32), DAMAGED),
    "a tensor beyond all files": (gguf(LLAMA, [tensor("a", [8], 2**64 - 1)], b"\0" * 32), DAMAGED),
    "a tensor of petabytes": (gguf(LLAMA, [tensor("a", [2**40, 2**20], 0)], b"\0" * 32), DAMAGED),
    "a tensor that overflows": (gguf(LLAMA, [tensor("a", [2**32, 2**32, 2**32], 0)], b"\0" * 32), DAMAGED),
    "a tensor of 2**32 dimensions": (gguf(LLAMA, [tensor("a", [8], 0, dimensions=2**32 - 1)], b"\0" * 32), DAMAGED),
    "a tensor of nothing known": (gguf(LLAMA, [tensor("a", [8], 0, kind=250)], b"\0" * 32), "unknown type"),
    "a tensor twice": (gguf(LLAMA, AB[:1] * 2, b"\0" * 64), "occurs twice"),
    "tensors over each other": (gguf(LLAMA, AB, b"\0" * 32), "overlap"),
    "tensors half over each other": (gguf(LLAMA, HALF, b"\0" * 64), "overlap"),
    "half a file": (gguf(LLAMA, [tensor("a", [1024], 0)], b"\0" * 2048), DAMAGED),
    "no vocabulary": (gguf(LLAMA, [tensor("a", [8], 0)], b"\0" * 32), "cannot be converted"),
    "an architecture by name": (
        gguf([said("general.architecture", "canary_module")], AB[:1], b"\0" * 32),
        "cannot be converted",
    ),
    "an end that is no token": (
        gguf([*LLAMA, number("tokenizer.ggml.eos_token_id", 2**31)], AB[:1], b"\0" * 32),
        "eos",
    ),
    "one part of many": (gguf([*LLAMA, number("split.count", 3)], AB[:1], b"\0" * 32), "one part of a split model"),
    "parts by text": (gguf([*LLAMA, said("split.count", "3")], AB[:1], b"\0" * 32), "one part of a split model"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused(name: str, attack: Attack):
    content, telling = FILES[name]
    attack.write("evil.gguf", content)
    attack.recipe(base="evil.gguf")
    attack.refused("data", "recipe.yaml", telling=telling, within=3.0)


@pytest.mark.parametrize("kind", ["a hole of 64 GB", "a hole behind", "a device", "a folder"])
def test_what_is_no_file(kind: str, attack: Attack):
    path = attack.work / "evil.gguf"
    if kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    else:
        whole = gguf([*LLAMA, array("tokenizer.ggml.tokens", STRING, 0)], AB[:1], b"\0" * 32)
        path.write_bytes(whole if kind == "a hole behind" else gguf(LLAMA, n_entries=100))
        with path.open("r+b") as file:
            file.truncate(1 << 36)
    attack.recipe(base="evil.gguf")
    attack.refused("data", "recipe.yaml", telling="evil.gguf", within=3.0)
