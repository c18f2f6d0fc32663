"""One thread, no network, a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    home: Path = tmp_path_factory.getbasetemp() / "home"
    monkeypatch.setenv("PEFTCTL_HOME", str(home))
