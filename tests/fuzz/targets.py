"""Everything that peftctl reads. A check returns, or raises PeftctlError; whatever else is a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fuzz.files_of_strangers import chat, data, gguf, parquet
from fuzz.folders_of_strangers import adapter, checkpoints
from fuzz.target import Target
from fuzz.words_of_strangers import override, recipe, words

TARGETS: dict[str, Callable[[Path], Target]] = {
    "adapter": adapter,
    "recipe": recipe,
    "override": override,
    "data": data,
    "parquet": parquet,
    "gguf": gguf,
    "chat": chat,
    "checkpoint": checkpoints,
    "words": words,
}
"""Each makes its target in an empty folder."""
