"""Prepared rows are used again for the same data and for nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftctl.data import cache
from peftctl.data.dataset import Dataset, Source
from peftctl.data.prepare import Prepared, prepare
from peftctl.errors import DataError, StorageError

Of = Callable[..., Any]
BASE = Dataset(train="rows.jsonl", max_length=60, max_skipped=0.5)


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} indeed"}]}


LONG = {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three " * 60}]}
ROWS = [chat("one"), LONG, chat("say <|im_end|>")]


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PEFTCTL_NO_CACHE")
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path / "home"))
    write(tmp_path, ROWS)


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, tokenizer: Any, dataset: Dataset = BASE, **options: Any) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    return prepare(dataset.train, dataset, tokenizer, folder, said.append, **options), said


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "home" / "data").iterdir())


def hit(said: list[str]) -> bool:
    return any(line.startswith("prepared before") for line in said)


def test_the_second_time_is_the_same_in_all(tmp_path: Path, tokenizer_of: Of) -> None:
    first, said = run(tmp_path, tokenizer_of("chatml"))
    again, told = run(tmp_path, tokenizer_of("chatml"))
    assert list(first.rows) == list(again.rows)
    for name in ("ledger", "sources", "parts", "formats", "digest", "chat_template", "stop_ids"):
        assert getattr(first, name) == getattr(again, name), name
    assert told == [*said, "prepared before: 3 rows from the cache"]
    assert len(entries(tmp_path)) == 1


def test_rows_are_those_of_a_run_without_cache(
    tmp_path: Path, tokenizer_of: Of, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(tmp_path, tokenizer_of("chatml"))[0]
    monkeypatch.setenv("PEFTCTL_NO_CACHE", "1")
    plain, said = run(tmp_path, tokenizer_of("chatml"))
    assert list(kept.rows) == list(plain.rows)
    assert not hit(said)
    assert len(entries(tmp_path)) == 1


CHANGES = {
    "max_length": {"max_length": 61},
    "on_long": {"on_long": "split"},
    "train_on": {"train_on": "all"},
    "system": {"system": "be kind"},
    "format": {"format": "messages"},
    "columns": {"columns": {"messages": "messages"}},
    "chat_template": {"chat_template": "zephyr"},
    "on_bad_row": {"on_bad_row": "skip"},
    "max_skipped": {"max_skipped": 0.4},
    "weight": {"train": Source(path="rows.jsonl", weight=2.0)},
    "max_rows": {"train": Source(path="rows.jsonl", max_rows=2)},
    "twice": {"train": ["rows.jsonl", "rows.jsonl"]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_setting_is_another_entry(tmp_path: Path, tokenizer_of: Of, what: str) -> None:
    run(tmp_path, tokenizer_of("chatml"))
    assert not hit(run(tmp_path, tokenizer_of("chatml"), replace(BASE, **CHANGES[what]))[1])
    assert len(entries(tmp_path)) == 2


def test_what_says_nothing_about_the_rows_changes_nothing(tmp_path: Path, tokenizer_of: Of) -> None:
    run(tmp_path, tokenizer_of("chatml"))
    assert hit(run(tmp_path, tokenizer_of("chatml"), replace(BASE, eval="other.jsonl"))[1])
    os.utime(tmp_path / "rows.jsonl", (0, 0))
    assert hit(run(tmp_path, tokenizer_of("chatml"))[1])


def test_another_byte_or_name_is_another_entry(tmp_path: Path, tokenizer_of: Of) -> None:
    run(tmp_path, tokenizer_of("chatml"))
    before = (tmp_path / "rows.jsonl").stat()
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("one indeed", "ome indeed"))
    os.utime(tmp_path / "rows.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert not hit(run(tmp_path, tokenizer_of("chatml"))[1])
    (tmp_path / "other.jsonl").write_text(text)
    prepared, said = run(tmp_path, tokenizer_of("chatml"), replace(BASE, train="other.jsonl"))
    assert not hit(said)
    assert list(prepared.sources) == ["other.jsonl"]


def test_another_tokenizer_is_another_entry(tmp_path: Path, tokenizer_of: Of) -> None:
    from copy import deepcopy

    tokenizer = tokenizer_of("chatml")
    run(tmp_path, tokenizer)
    more = deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    other = deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template + "\n"
    for changed in (more, other):
        assert not hit(run(tmp_path, changed)[1])
    assert hit(run(tmp_path, deepcopy(tokenizer))[1])


def test_other_code_is_another_entry(tmp_path: Path, tokenizer_of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, tokenizer_of("chatml"))
    monkeypatch.setattr(cache, "of_code", lambda: "other")
    assert not hit(run(tmp_path, tokenizer_of("chatml"))[1])


def test_a_template_file_is_read(tmp_path: Path, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    (tmp_path / "mine.jinja").write_text(tokenizer.chat_template)
    dataset = replace(BASE, chat_template="mine.jinja")
    run(tmp_path, tokenizer, dataset)
    assert hit(run(tmp_path, tokenizer, dataset)[1])
    (tmp_path / "mine.jinja").write_text(tokenizer.chat_template + "{# #}")
    assert not hit(run(tmp_path, tokenizer, dataset)[1])


def test_a_template_with_the_date_is_not_kept(tmp_path: Path, tokenizer_of: Of) -> None:
    tokenizer = tokenizer_of("chatml")
    dated = "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
    (tmp_path / "mine.jinja").write_text(dated + tokenizer.chat_template)
    dataset = replace(BASE, chat_template="mine.jinja")
    for _ in range(2):
        assert not hit(run(tmp_path, tokenizer, dataset)[1])


def test_rows_that_keep_their_texts_are_not_from_the_cache(tmp_path: Path, tokenizer_of: Of) -> None:
    run(tmp_path, tokenizer_of("chatml"))
    prepared, said = run(tmp_path, tokenizer_of("chatml"), keep_parsed=True)
    assert not hit(said)
    assert len(prepared.parsed) == 3


@pytest.mark.parametrize("damage", ["ids.bin", "spans.bin", "rows.bin", "manifest.json", "missing", "more"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, tokenizer_of: Of, damage: str) -> None:
    whole = list(run(tmp_path, tokenizer_of("chatml"))[0].rows)
    (entry,) = entries(tmp_path)
    if damage == "missing":
        (entry / "spans.bin").unlink()
    elif damage == "more":
        (entry / "ids.bin").write_bytes((entry / "ids.bin").read_bytes() + b"\0")
    else:
        data = bytearray((entry / damage).read_bytes())
        data[len(data) // 2] ^= 1
        (entry / damage).write_bytes(data)
    prepared, said = run(tmp_path, tokenizer_of("chatml"))
    assert "are damaged: preparing them again" in said[0]
    assert list(prepared.rows) == whole
    assert hit(run(tmp_path, tokenizer_of("chatml"))[1])


def test_a_mistake_leaves_no_entry(tmp_path: Path, tokenizer_of: Of) -> None:
    write(tmp_path, [*ROWS, {"messages": []}])
    for _ in range(2):
        with pytest.raises(DataError, match="no messages"):
            run(tmp_path, tokenizer_of("chatml"))
    home = tmp_path / "home" / "data"
    assert not home.exists() or not list(home.iterdir())


def test_where_nothing_can_be_written_rows_are_prepared_all_the_same(
    tmp_path: Path, tokenizer_of: Of, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path / "file"))
    prepared, said = run(tmp_path, tokenizer_of("chatml"))
    assert len(prepared.rows) == 3
    assert "prepared rows are not kept: " in said[0]


def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path, tokenizer_of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftctl.data.store.Writer.write", full)
    with pytest.raises(StorageError, match="no space left on device"):
        run(tmp_path, tokenizer_of("chatml"))
    assert entries(tmp_path) == []


def test_what_nobody_used_for_a_month_goes(tmp_path: Path, tokenizer_of: Of) -> None:
    run(tmp_path, tokenizer_of("chatml"))
    (old,) = entries(tmp_path)
    past = time.time() - cache.UNUSED - 60
    os.utime(old, (past, past))
    run(tmp_path, tokenizer_of("chatml"))  # used: its time starts anew
    run(tmp_path, tokenizer_of("chatml"), replace(BASE, max_length=61))
    assert old in entries(tmp_path)
    os.utime(old, (past, past))
    run(tmp_path, tokenizer_of("chatml"), replace(BASE, max_length=62))
    assert old not in entries(tmp_path)


def test_several_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, tiny_chat; from pathlib import Path;"
        "from peftctl.data.dataset import Dataset; from peftctl.data.prepare import prepare;"
        "p = prepare('rows.jsonl', Dataset(train='rows.jsonl'), tiny_chat.tokenizer(), Path('.'));"
        "print(sum(map(sum, (row.ids for row in p.rows))))"
    )
    write(tmp_path, [chat(f"row {number}") for number in range(200)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    sums = [run.communicate(timeout=120)[0] for run in runs]
    assert len(set(sums)) == 1
    assert int(sums[0]) > 0
    assert [entry.name.startswith(".") for entry in entries(tmp_path)] == [False]
