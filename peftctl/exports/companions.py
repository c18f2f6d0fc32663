"""What stands beside the weights of a merged model: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftctl.models.folder import CONFIG, read_json
from peftctl.training import filesystem

TEMPLATE = "chat_template.jinja"
FILES = (
    *("generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json"),
    *(TEMPLATE, "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    "video_preprocessor_config.json",
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""What travels from the base as it is; licences ask for it."""

ADAPTER_FILES = (TEMPLATE, "LICENSE*", "LICENCE*", "NOTICE*")
"""What travels with an adapter."""


def write_config(folder: Path, base: Path, place: str, dtype: torch.dtype | None, changed: Mapping[str, Any]) -> None:
    """The base's `config.json` for the merged weights, with what `changed`; a key that is None there is removed.

    `dtype` is None when they keep that of the base's files.
    """
    config = read_json(base / CONFIG, place)
    config.pop("quantization_config", None)
    config.pop("auto_map", None)  # names code that does not travel
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # its older name
        config[key] = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in {**config, **changed}.items() if key not in changed or value is not None}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    filesystem.write(folder / CONFIG, [text.encode()])


def classifier_config(model: Any) -> dict[str, Any]:
    """What the configuration of the classifier `model` says that its base's does not; None for what it must not say."""
    labels = {str(number): label for number, label in model.config.id2label.items()}
    return {
        "architectures": [type(model).__name__],
        "id2label": labels,
        "label2id": {label: int(number) for number, label in labels.items()},
        "num_labels": None,  # follows from the labels
        "problem_type": None,  # transformers' own loss, which peftctl does not use
        "pad_token_id": model.config.pad_token_id,  # a decoder classifies at the last token that is none
    }


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
