"""What a run was made from: enough to repeat it, and to notice another base or other data."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("peftctl", "torch", "transformers", "accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The kind of machine, without its name."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {"platform": sys.platform, "machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus}


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def json_bytes(record: dict[str, Any]) -> bytes:
    """A record as the text of a JSON file."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"
