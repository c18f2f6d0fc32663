"""A harness that cannot fail proves nothing: each kind of failure, made on purpose, is seen and kept."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzz import corpora
from fuzz.mutations import Case, Mutator
from fuzz.run import Result, run
from fuzz.target import Target
from fuzz.targets import TARGETS

from peftctl.engine import disk
from peftctl.errors import DataError, PeftctlError

CORPUS = [{"a.json": b'{"a": [1, "two"], "b": {"c": null}}', "b.bin": bytes(range(64))}]


def outcome(check: Callable[[Case], object], cases: int = 40, seconds: float = 1.0, **more: Path) -> Result:
    return run(Target(Mutator(CORPUS), lambda case: check(case) and None, seconds), cases, seed=1, **more)


def refuses(text: str) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        raise PeftctlError(text)

    return check


def test_a_good_target_passes():
    assert not outcome(lambda case: None).failures
    assert outcome(refuses("a.json: nothing")).refused == 40


def test_an_exception_is_a_failure_and_its_bytes_are_kept(tmp_path: Path):
    def check(case: Case) -> None:
        if case != CORPUS[0]:
            raise KeyError("what is this")

    result = outcome(check, failures=tmp_path)
    assert len(result.failures) == 20  # and then it gives up
    assert "KeyError: 'what is this'" in result.failures[0]
    number = int(re.match(r"case (\d+)", result.failures[0])[1])
    kept = tmp_path / f"1-{number}" / "case"
    assert corpora.files(kept) == Mutator(CORPUS).case(Random(1 << 40 | number))


def test_a_hang_is_a_failure_even_where_every_exception_is_caught():
    def check(case: Case) -> None:
        end = time.process_time() + 5
        while time.process_time() < end:
            with contextlib.suppress(Exception):
                sum(range(1000))

    result = outcome(check, cases=1, seconds=0.1)
    assert result.failures == ["case 0: more than 0.1 s"]
    assert result.slowest[0] < 1


def test_memory_is_a_failure_even_when_it_is_given_back():
    held = []

    def check(case: Case) -> None:
        if not held:
            held.append(1)
            return
        bytearray(300 << 20)[::4096] = b"x" * (300 << 20 >> 12)

    (failure,) = outcome(check, cases=1).failures
    assert "MB more" in failure


@pytest.mark.parametrize(
    "text",
    ["", "evil \x1b[2J", "half \ud800", "right \u202e left", "x" * 5_000],
    ids=["none", "escape", "half", "turned", "long"],
)
def test_an_error_that_cannot_be_shown_is_a_failure(text: str):
    assert outcome(refuses(text), cases=1).failures


def test_a_base_that_is_written_to_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = TARGETS["adapter"](tmp_path)
    honest = disk.fill

    def evil(model, name, values):
        honest(model, name, values)
        model.lm_head.weight.data[0, 0] += 1

    monkeypatch.setattr(disk, "fill", evil)
    assert run(target, 300, seed=0, give_up=1).failures


def test_a_reader_without_its_checks_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from peftctl.data import json_rows

    def trusting(text: str, place: str) -> object:
        return json_rows.Row(place, json_rows.json.loads(text))

    monkeypatch.setattr(json_rows, "_row", trusting)
    assert run(TARGETS["data"](tmp_path), 300, seed=0, give_up=1).failures


def test_a_case_is_a_function_of_its_seed(tmp_path: Path):
    mutator = TARGETS["data"](tmp_path).mutator
    once, again = ([mutator.case(Random(number)) for number in range(200)] for _ in range(2))
    assert once == again
    assert len({str(case) for case in once}) > 150


def test_an_error_in_a_row_counts_as_refused():
    def check(case: Case) -> None:
        raise DataError("rows.jsonl:1: no")

    assert outcome(check).refused == 40
