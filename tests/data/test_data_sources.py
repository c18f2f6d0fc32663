from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftctl.data import sources
from peftctl.data.dataset import Source
from peftctl.data.sources import listed, read
from peftctl.errors import DataError


def places(path: str, root: Path) -> list[str]:
    return [item[0] for item in read(Source(path=path), root)]


def test_a_spec_is_one_source_or_several() -> None:
    source = Source(path="b", split="test")
    assert listed("a") == [Source(path="a")]
    assert listed(source) == [source]
    assert listed(["a", source]) == [Source(path="a"), source]


def test_places_name_files_as_they_were_written(tmp_path: Path, write: Callable[..., Path]) -> None:
    for name in ("b.jsonl", "a.json.jsonl", "notes.txt", "deep/c.jsonl"):
        write({"text": "a"}, name=f"data/{name}")
    (tmp_path / "data/d.json").write_text('[{"text": "a"}]')
    assert places("data/b.jsonl", tmp_path) == ["data/b.jsonl:1"]
    assert places("data", tmp_path) == ["data/a.json.jsonl:1", "data/b.jsonl:1", "data/d.json:1"]
    assert places("data/", tmp_path) == places("data", tmp_path)
    assert places("data/*.jsonl", tmp_path) == ["data/a.json.jsonl:1", "data/b.jsonl:1"]
    assert places("data/**/*.jsonl", tmp_path) == ["data/a.json.jsonl:1", "data/b.jsonl:1", "data/deep/c.jsonl:1"]
    absolute = str(tmp_path / "data/b.jsonl")
    assert places(absolute, Path("/nowhere")) == [f"{absolute}:1"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path, write: Callable[..., Path]) -> None:
    write({"text": "a"}, name="rows[1].jsonl")
    assert places("rows[1].jsonl", tmp_path) == ["rows[1].jsonl:1"]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("dta/train.jsonl", "did you mean `data`?"),
        ("data/tran.jsonl", "did you mean `data/train.jsonl`?"),
        ("data/train.json", "did you mean `data/train.jsonl`?"),
        ("data/train.jsonl/x.jsonl", "no such file or folder"),
        ("./data/tran", "not a hub id either"),
        ("a/b/c", "not a hub id either"),
        ("../x", "not a hub id either"),
        ("data/*.tsv", "no file matches"),
        ("empty", "no `.jsonl` or `.json` file in this folder"),
        ("data/notes.csv", "cannot read this kind of file"),
        ("data/n[o]tes.csv", "data/notes.csv: cannot read this kind of file"),
        ("a" * 300 + ".jsonl", "cannot be read"),
        ("https://example.org/a.jsonl", "not a hub id either"),
    ],
)
def test_a_source_that_is_not_there(tmp_path: Path, write: Callable[..., Path], path: str, what: str) -> None:
    write({"text": "a"}, name="data/train.jsonl")
    (tmp_path / "data/notes.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        places(path, tmp_path)
    assert what in str(caught.value)
    assert caught.value.problems[0].text.startswith(path.replace("[o]", "o"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the hub: what is loaded, and what it was asked for."""
    state: dict[str, Any] = {"rows": [], "asked": []}

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        state["asked"].append((path, name, split))
        if isinstance(state["rows"], Exception):
            raise state["rows"]
        return state["rows"]  # type: ignore[no-any-return]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    sources._loaded.cache_clear()
    yield state
    sources._loaded.cache_clear()


def test_a_hub_id_is_read_by_datasets(tmp_path: Path, hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": "a", "label": None}, {"text": "b", "label": 1}]
    source, seen = Source(path="org/name", split="test", subset="en"), bytearray()
    rows = list(read(source, tmp_path, seen.extend))
    assert rows == [("org/name[test]:1", {"text": "a"}), ("org/name[test]:2", {"text": "b", "label": 1})]
    assert b'"label": 1' in seen
    list(read(source, tmp_path))
    assert hub["asked"] == [("org/name", "en", "test")]


def test_an_existing_folder_beats_a_hub_id(tmp_path: Path, write: Callable[..., Path], hub: dict[str, Any]) -> None:
    write({"text": "a"}, name="org/name/rows.jsonl")
    assert places("org/name", tmp_path) == ["org/name/rows.jsonl:1"]
    assert hub["asked"] == []


def test_what_the_hub_refuses(tmp_path: Path, write: Callable[..., Path], hub: dict[str, Any]) -> None:
    hub["rows"] = ConnectionError("Couldn't reach 'org/name' on the Hub\nlong story")
    with pytest.raises(DataError) as caught:
        places("org/name", tmp_path)
    text, hint = caught.value.problems[0]
    assert text == "org/name: no such file, and the hub data set cannot be loaded: Couldn't reach 'org/name' on the Hub"
    assert hint == "check the id, `split` and `subset`, and that the hub can be reached"
    write({"text": "a"}, name="data/train/rows.jsonl")
    with pytest.raises(DataError, match=r"did you mean `data/train`\?"):
        places("data/trian", tmp_path)
    hub["rows"] = []
    with pytest.raises(DataError, match=r"org/other\[train\]: no rows"):
        places("org/other", tmp_path)


def test_the_real_datasets_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="org/name: no such file, and the hub data set cannot be loaded"):
        places("org/name", tmp_path)
