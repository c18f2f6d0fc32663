"""What stands beside the weights of a merged model: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from peftctl.models.folder import CONFIG, read_json
from peftctl.training import filesystem

TEMPLATE = "chat_template.jinja"
FILES = (
    *("generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json"),
    *(TEMPLATE, "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""What travels from the base as it is; licences ask for it."""

ADAPTER_FILES = (TEMPLATE, "LICENSE*", "LICENCE*", "NOTICE*")
"""What travels with an adapter."""


def write_config(folder: Path, base: Path, place: str, dtype: torch.dtype | None, untied: bool) -> None:
    """The base's `config.json` for the merged weights; `dtype` is None when they keep that of the base's files."""
    config = read_json(base / CONFIG, place)
    config.pop("quantization_config", None)
    config.pop("auto_map", None)  # names code that does not travel
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # its older name
        config[key] = str(dtype).removeprefix("torch.")
    if untied:
        config["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    filesystem.write(folder / CONFIG, [text.encode()])


def copy_companions(folder: Path, base: Path, adapter: Path) -> None:
    """Everything of `FILES` from the base; an adapter's own chat template, which it was trained with, comes first."""
    own = (adapter / TEMPLATE).is_file()
    copy_files(base, folder, FILES, but=(TEMPLATE, "chat_template.json") if own else ())
    if own:
        copy_files(adapter, folder, (TEMPLATE,))


def copy_files(source: Path, target: Path, patterns: Sequence[str], but: Sequence[str] = ()) -> None:
    """Copy the files of a folder that match any of `patterns`, piece by piece; links become what they point to."""
    found = {path.name: path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    for name, path in sorted(found.items()):
        if name not in but:
            filesystem.write(target / name, pieces(path))


def pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, 16 MiB at a time."""
    with filesystem.guarded(path), path.open("rb") as file:
        while piece := file.read(1 << 24):
            yield piece
