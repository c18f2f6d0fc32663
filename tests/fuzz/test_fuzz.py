"""Everything that peftctl reads, fed with mutants: a fixed seed here, a million of them with `python -m fuzz.run`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.run import run
from fuzz.targets import TARGETS

CASES = {
    "adapter": 1_000,
    "recipe": 400,
    "override": 2_000,
    "data": 2_500,
    "parquet": 2_000,
    "gguf": 3_000,
    "chat": 500,
    "checkpoint": 800,
    "words": 60,
}


def test_every_target_is_run():
    assert CASES.keys() == TARGETS.keys()


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_errors_of_ours(name: str, tmp_path: Path):
    (tmp_path / "target").mkdir()
    result = run(TARGETS[name](tmp_path / "target"), CASES[name], seed=2026, failures=tmp_path)
    assert not result.failures, "\n\n".join(result.failures)
    assert result.cases == CASES[name]
    assert result.accepted > 0, "mutants that are all refused say little about what is behind the first check"
    assert result.refused > 0 or name == "words", "mutants that all fit are no mutants"  # `words` sees exit codes only
    assert result.growth < 64


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_more(name: str, tmp_path: Path):
    (tmp_path / "target").mkdir()
    result = run(TARGETS[name](tmp_path / "target"), CASES[name] * 10, seed=7, failures=tmp_path)
    assert not result.failures, "\n\n".join(result.failures)
