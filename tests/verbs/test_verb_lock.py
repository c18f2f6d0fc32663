"""Ten processes start the same run at once: one of them trains."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import peftctl
from peftctl.errors import RunError
from peftctl.verbs.mortal import live

STARTS = 10


def start(recipe: Any, place: Path, number: int) -> None:
    """Train, and leave a file that says whether."""
    steps: list[int] = []
    try:
        peftctl.train(
            recipe,
            output=place / "run",
            resume=True,
            listen=lambda event: steps.append(event["step"]) if event["event"] == "step" else None,
        )
    except RunError as error:
        if "another process" not in str(error):
            raise
    if steps:
        (place / f"winner-{number}").touch()


@pytest.mark.slow
def test_one_trains(made: Callable[..., Any], tmp_path: Path):
    children = []
    for number in range(STARTS):
        child = os.fork()
        if child == 0:
            os._exit(live(partial(start, made(), tmp_path, number), tmp_path / f"log-{number}") or 0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    logs = "\n".join((tmp_path / f"log-{number}").read_text() for number in range(STARTS))
    assert codes == [0] * STARTS, logs
    assert len(list(tmp_path.glob("winner-*"))) == 1, logs
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
