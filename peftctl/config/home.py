"""The user's home, and where peftctl keeps what it can make again: converted models, prepared rows."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$PEFTCTL_HOME`, else `~/.cache/peftctl`."""
    home = os.environ.get("PEFTCTL_HOME")
    return expanded(home) if home else Path.home() / ".cache" / "peftctl"


def expanded(text: str | Path) -> Path:
    """A path with its `~` filled in; that of a user who is not known stays, and is then no file."""
    return Path(os.path.expanduser(text))
