"""Which texts of a recipe are paths, seen from its folder, and which are hub ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftctl import recipe as recipes
from peftctl.data.dataset import Source
from peftctl.data.sources import SUFFIXES

RECIPE = """
model: {name_or_path: org/model}
method: {type: lora}
dataset: {train: TRAIN}
output: runs/x
"""


@pytest.mark.parametrize("name", [*(f"data/rows{suffix.upper()}" for suffix in SUFFIXES), "data/*", "./rows", "a.zip"])
def test_a_file_is_one_even_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/r.yaml").write_text(RECIPE.replace("TRAIN", f"[{name}, {{path: {name}, max_rows: 2}}]"))
    expected = f"here/{name.removeprefix('./')}"
    train = recipes.read("here/r.yaml").dataset.train
    assert train == [expected, Source(path=expected, max_rows=2)]


@pytest.mark.parametrize("name", ["org/name", "name", "org/name-1.5", "org/rows.jsonl.v2"])
def test_a_hub_id_stays_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("TRAIN", name))
    recipe = recipes.read(tmp_path / "r.yaml")
    assert (recipe.dataset.train, recipe.model.name_or_path) == (name, "org/model")
