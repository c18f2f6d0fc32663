"""The process that forks, a tiny base model, and a fresh attack for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_chat
from hostile.attack import Attack, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), base)
    yield server
    server.close()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_base(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def attack(server: Server, base: Path, tmp_path: Path) -> Attack:
    return Attack(server, tmp_path, base)
