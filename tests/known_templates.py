"""The chat templates of many model families, as trl ships them, and their special tokens."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_SPEC = importlib.util.find_spec("trl")
_FOLDERS = [Path(folder) / "chat_templates" for folder in (_SPEC and _SPEC.submodule_search_locations) or []]
_FILES = sorted(path for folder in _FOLDERS for path in folder.glob("*.jinja"))

TEMPLATES = {path.stem: path for path in _FILES if not path.stem.endswith("_training")}
TRAINING = {path.stem.removesuffix("_training"): path for path in _FILES if path.stem.endswith("_training")}
"""Those that mark what is generated, by the family's name."""

SPECIAL = re.compile(r"<\|[a-zA-Z_0-9]+\|>|<\uff5c[^\uff5c]+\uff5c>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>")
