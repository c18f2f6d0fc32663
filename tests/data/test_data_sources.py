from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftctl.data import hub_rows
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
    for name in ("b.jsonl", "a.json.jsonl", "README.md", "LICENSE.txt", "._b.jsonl", "notes.pdf", "deep/c.jsonl"):
        write({"text": "a"}, name=f"data/{name}")
    assert places("data/b.jsonl", tmp_path) == ["data/b.jsonl:1"]
    assert places("data", tmp_path) == ["data/a.json.jsonl:1", "data/b.jsonl:1"]
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
        ("empty", "no file of rows in this folder (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`"),
        ("data/notes.pdf", "cannot read this kind of file"),
        ("data/n[o]tes.pdf", "data/notes.pdf: cannot read this kind of file"),
        ("a" * 300 + ".jsonl", "cannot be read"),
        ("https://example.org/a.jsonl", "not a hub id either"),
    ],
)
def test_a_source_that_is_not_there(tmp_path: Path, write: Callable[..., Path], path: str, what: str) -> None:
    write({"text": "a"}, name="data/train.jsonl")
    (tmp_path / "data/notes.pdf").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        places(path, tmp_path)
    assert what in str(caught.value)
    assert caught.value.problems[0].text.startswith(path.replace("[o]", "o"))


def test_a_source_is_one_kind_of_files(tmp_path: Path, write: Callable[..., Path]) -> None:
    """The same rows are often there in two forms, and notes lie beside rows: nobody means both."""
    write({"text": "a"}, name="data/a.jsonl")
    (tmp_path / "data/a.csv").write_text("text\na\n")
    for path, hint in (("data", "`data/*.csv`"), ("data/*", "`*.csv`")):
        with pytest.raises(DataError, match=r"several kinds of files \(`.csv`, `.jsonl`\)") as caught:
            places(path, tmp_path)
        assert str(caught.value).endswith(hint)
    (tmp_path / "data/b.csv.gz").write_bytes(gzip.compress(b"text\nb\n"))
    assert places("data/*.csv*", tmp_path) == ["data/a.csv:2", "data/b.csv.gz:2"]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")  # reading it would wait for ever
    with pytest.raises(DataError, match=r"rows.jsonl: not a file"):
        places("rows.jsonl", tmp_path)


def test_max_rows_counts_from_the_first_on(tmp_path: Path, write: Callable[..., Path]) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\nno json\n{"text": "c"}\n')
    found = list(read(Source(path="*.jsonl", max_rows=4), tmp_path))
    assert [item[0].split(": ")[0] for item in found] == ["a.jsonl:1", "a.jsonl:2:1", "a.jsonl:3", "b.jsonl:1"]


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("split", "test", "`split` is for hub data sets"),
        ("subset", "en", "`subset` is for hub data sets"),
        ("streaming", True, "`streaming` is for hub data sets"),
        ("sample_by", "line", "`sample_by` is for plain text"),
    ],
)
def test_an_option_that_says_nothing_about_a_file(
    tmp_path: Path, write: Callable[..., Path], option: str, value: Any, what: str
) -> None:
    write({"text": "a"})
    with pytest.raises(DataError, match=what):
        list(read(Source(**{"path": "rows.jsonl", "max_rows": 1, option: value}), tmp_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the hub: what is loaded, and what it was asked for."""
    state: dict[str, Any] = {"rows": [], "asked": []}

    def load_dataset(path: str, name: str | None, split: str, streaming: bool = False) -> Iterable[dict[str, Any]]:
        state["asked"].append((path, name, split))
        if isinstance(state["rows"], Exception):
            raise state["rows"]
        return iter(state["rows"]) if streaming else state["rows"]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    hub_rows._loaded.cache_clear()
    yield state
    hub_rows._loaded.cache_clear()


def test_a_hub_id_is_read_by_datasets(tmp_path: Path, hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": "a", "label": None}, {"text": "b", "label": 1}]
    source, seen = Source(path="org/name", split="test", subset="en"), bytearray()
    rows = list(read(source, tmp_path, seen.extend))
    assert rows == [("org/name[test]:1", {"text": "a"}), ("org/name[test]:2", {"text": "b", "label": 1})]
    assert b'"label": 1' in seen
    list(read(source, tmp_path))
    assert hub["asked"] == [("org/name", "en", "test")]


def test_nulls_of_a_table_are_keys_left_out(tmp_path: Path, hub: dict[str, Any]) -> None:
    call = {"role": "assistant", "content": "a", "tool_calls": None}
    hub["rows"] = [{"messages": [call], "list": [1, None], "a": None}]
    (row,) = read(Source(path="org/name"), tmp_path)
    assert row[1] == {"messages": [{"role": "assistant", "content": "a"}], "list": [1, None]}


def test_streaming_fetches_the_first_rows_once(tmp_path: Path, hub: dict[str, Any]) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        for number in count(1):
            assert number <= 3, "fetched more than was asked for"
            yield {"text": str(number)}

    hub["rows"] = endless()
    source = Source(path="org/name", streaming=True, max_rows=3)
    first = list(read(source, tmp_path))
    assert [row[0] for row in first] == [f"org/name[train]:{n}" for n in (1, 2, 3)]
    assert list(read(source, tmp_path)) == first
    assert hub["asked"] == [("org/name", None, "train")]


def test_a_hub_that_fails_on_the_way(tmp_path: Path, hub: dict[str, Any]) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        raise ConnectionError("gone")

    hub["rows"] = broken()
    with pytest.raises(DataError, match=r"^org/name\[train\]: cannot be read after row 1: gone"):
        list(read(Source(path="org/name"), tmp_path))


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


def test_the_real_datasets(tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for a hub id: `datasets` takes either, and peftctl would read a folder itself."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(*[{"text": str(i), "label": None if i else 0} for i in range(5)], name="name/train.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    rows = [{"text": "0", "label": 0}, *[{"text": str(i)} for i in range(1, 5)]]
    assert [row[1] for row in read(Source(path="name"), tmp_path / "elsewhere")] == rows
    streamed = Source(path="name", streaming=True, max_rows=2)
    assert [row[1] for row in read(streamed, tmp_path / "elsewhere")] == rows[:2]


def test_the_real_datasets_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="org/name: no such file, and the hub data set cannot be loaded"):
        places("org/name", tmp_path)
