from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import Died, FaultyDisk, installed

from peftctl.errors import StorageError
from peftctl.training import filesystem
from peftctl.training.journal import Journal


def run(path: Path, steps: range) -> None:
    with Journal(path, step=steps.start) as journal:
        for step in steps:
            journal.write({"event": "train", "step": step + 1, "loss": 1 / (step + 1)})
            if step % 2:
                journal.write({"event": "eval", "step": step + 1, "loss": 2.0})


def test_a_line_and_a_call_for_each_event(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    event = {"event": "train", "step": 1, "loss": math.nan, "norms": (math.inf, -math.inf, 1.5), "text": "ü\n"}
    with Journal(tmp_path / "metrics.jsonl", listener=heard.append) as journal:
        journal.write(event)
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there before the journal is closed
    assert heard == [event]
    assert math.isnan(heard[0]["loss"])
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert strict == {"event": "train", "step": 1, "loss": "nan", "norms": ["inf", "-inf", 1.5], "text": "ü\n"}


@pytest.mark.parametrize("stopped", range(7))
def test_resumed_it_reads_as_if_never_interrupted(tmp_path: Path, stopped: int) -> None:
    run(tmp_path / "whole", range(6))
    for resumed in range(stopped + 1):
        path = tmp_path / f"from-{resumed}"
        run(path, range(stopped))
        run(path, range(resumed, 6))
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_torn_lines_are_dropped_wherever_the_crash_came(tmp_path: Path) -> None:
    run(tmp_path / "whole", range(3))
    data = (tmp_path / "whole").read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for end in range(last + 1, len(data)):
        (tmp_path / "torn").write_bytes(data[:end])
        run(tmp_path / "torn", range(2, 3))
        assert (tmp_path / "torn").read_bytes() == data
    (tmp_path / "torn").write_bytes(data[:last] + b"\0" * 50 + b"\n[1]\n\xff\n" + data[last:])
    with Journal(tmp_path / "torn", step=3):
        pass
    assert (tmp_path / "torn").read_bytes() == data


def test_events_without_a_step_stay_until_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"plan"}\n{"step":1}\n{"event":"note"}\n{"step":2}\n{"event":"note"}\n')
    with Journal(path, step=1):
        pass
    assert path.read_text() == '{"event":"plan"}\n{"step":1}\n{"event":"note"}\n'


def test_a_full_disk_leaves_whole_lines_and_gets_the_others_later(tmp_path: Path) -> None:
    path, told = tmp_path / "metrics.jsonl", []
    with (
        installed(FaultyDisk(at=4, error=errno.ENOSPC, short=True)) as disk,
        Journal(path, listener=told.append) as journal,
    ):
        journal.write({"step": 1})
        journal.write({"step": 2})  # the disk took seven bytes of it
        assert path.read_text() == '{"step": 1}\n'
        journal.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert [call[0] for call in disk.calls[:3]] == ["create", "write", "write"]
    warning = told.pop(1)
    assert "no space left on the disk; its lines are kept in memory" in warning["text"]
    assert told == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_disk_that_stays_full_is_an_error_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("metrics.jsonl: no space left on the disk")

    told: list[dict[str, object]] = []
    journal = Journal(tmp_path / "metrics.jsonl", listener=told.append)
    monkeypatch.setattr(filesystem, "append", full)
    for step in range(3):
        journal.write({"event": "step", "step": step})
    assert [event["event"] for event in told] == ["warning", "step", "step", "step"]
    with pytest.raises(StorageError), journal:
        pass
    with pytest.raises(KeyError), Journal(tmp_path / "other.jsonl") as other:
        other.write({"step": {}["what ended the run"]})


def test_killed_while_rewinding_it_keeps_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, range(6))
    before = path.read_bytes()
    for at in range(4):  # unlink, create, write, sync: the rename comes after
        with installed(FaultyDisk(at=at)), pytest.raises(Died):
            Journal(path, step=2)
        assert path.read_bytes() == before


def test_a_missing_folder_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        Journal(tmp_path / "none" / "metrics.jsonl")


def test_it_syncs_its_own_file(tmp_path: Path) -> None:
    with Journal(tmp_path / "metrics.jsonl") as journal, installed(FaultyDisk()) as disk:
        journal.sync()
    assert disk.calls == [("fsync", tmp_path / "metrics.jsonl", None)]
