"""Which adapters a model already holds: what a merge records, and what the next one looks at."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from peftctl.engine.tensor_file import PREFIX, WEIGHTS, header
from peftctl.errors import AdapterError
from peftctl.models.folder import read_json

REPORT = "merge_report.json"


def digest(adapter: Path) -> str:
    """SHA-256 over the adapter's tensors, by name: the same for a copy that another program saved again.

    Raises AdapterError when there are none, or damaged ones.
    """
    from safetensors import safe_open

    stored = {key.removeprefix(PREFIX): key for key in header(adapter / WEIGHTS)}
    found = hashlib.sha256()
    with safe_open(adapter / WEIGHTS, "pt") as file:
        for name in sorted(stored):
            tensor = file.get_tensor(stored[name]).contiguous()
            found.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}:".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def merged_before(base: Path, place: str) -> list[str]:
    """The digests of the adapters that the model in `base` came from, oldest first; most models have none.

    Raises ModelError when its report is damaged.
    """
    if not (base / REPORT).is_file():
        return []
    report: dict[str, Any] = read_json(base / REPORT, place)
    earlier, last = report.get("merged_before"), report.get("adapter")
    found = [text for text in earlier if isinstance(text, str)] if isinstance(earlier, list) else []
    last = last.get("sha256") if isinstance(last, dict) else None
    return [*found, last] if isinstance(last, str) else found


def refuse_twice(adapter: str, before: list[str], place: str) -> None:
    """Raise AdapterError when the adapter with this digest is in the base already."""
    if adapter in before:
        raise AdapterError(
            f"{place}: this adapter is merged into it already", "name the model that the adapter was trained on"
        )
