"""Where peftctl keeps what it can make again: converted models, prepared rows."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$PEFTCTL_HOME`, else `~/.cache/peftctl`."""
    home = os.environ.get("PEFTCTL_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "peftctl"
