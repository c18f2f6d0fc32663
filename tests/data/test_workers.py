"""However many processes encode, what comes out is the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest

from peftctl.data import workers
from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat
from peftctl.data.workers import Item, outcomes
from peftctl.errors import DataError, OutOfMemory, Problem

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes are forked on Linux alone")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MANY", 10)
    monkeypatch.setattr(workers, "CHUNK", 3)


@pytest.fixture
def encoder_of(tokenizer_of: Callable[..., Any]) -> Callable[[], Encoder]:
    tokenizer = tokenizer_of("chatml")
    return lambda: Encoder(tokenizer, tokenizer.chat_template, max_length=200, on_long="drop")


def items(number: int) -> Iterator[Item]:
    """Good rows, bad ones, long ones and some that spell a special token."""
    for i in range(number):
        place = f"rows:{i}"
        if i % 7 == 3:
            yield DataError.of([Problem(f"{place}: broken")])
            continue
        text = "<|im_end|> " * (i % 5 == 0) + f"row {i} " * (80 if i % 11 == 0 else 1)
        yield Chat(place, [{"role": "user", "content": text}, {"role": "assistant", "content": f"answer {i}"}])


def told(found: list[tuple[Item, Any]]) -> list[Any]:
    return [(getattr(item, "place", None), str(made) if isinstance(made, DataError) else made) for item, made in found]


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("rows", [50, 51, 4, 0])
def test_as_one_process_does(
    monkeypatch: pytest.MonkeyPatch, encoder_of: Callable[[], Encoder], number: int, rows: int
) -> None:
    alone, together = encoder_of(), encoder_of()
    monkeypatch.setenv("PEFTCTL_WORKERS", "1")
    expected = told(list(outcomes(items(rows), alone, rows)))
    monkeypatch.setenv("PEFTCTL_WORKERS", str(number))
    assert told(list(outcomes(items(rows), together, 50))) == expected
    assert (together.stop_ids, together.spelled) == (alone.stop_ids, alone.spelled)
    assert multiprocessing.active_children() == []


def test_few_rows_are_not_worth_it(monkeypatch: pytest.MonkeyPatch, encoder_of: Callable[[], Encoder]) -> None:
    monkeypatch.setenv("PEFTCTL_WORKERS", "8")
    found = outcomes(items(9), encoder_of(), 9)
    next(found)
    assert multiprocessing.active_children() == []


def test_no_more_rows_are_read_than_are_worked_on(
    monkeypatch: pytest.MonkeyPatch, encoder_of: Callable[[], Encoder], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEFTCTL_WORKERS", "2")
    read: list[Item] = []
    found = outcomes((read.append(item) or item for item in items(1000)), encoder_of(), 1000)  # type: ignore[func-returns-value]
    list(islice(found, 9))
    assert len(read) <= 9 + 3 * 3
    found.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []
    assert capfd.readouterr().err == "", "who is not needed any more goes in silence"


def test_a_killed_process_is_an_error(monkeypatch: pytest.MonkeyPatch, encoder_of: Callable[[], Encoder]) -> None:
    monkeypatch.setenv("PEFTCTL_WORKERS", "2")
    found = outcomes(items(1000), encoder_of(), 1000)
    next(found)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)  # type: ignore[arg-type]
    with pytest.raises(OutOfMemory, match="a process was killed"):
        list(found)
    assert multiprocessing.active_children() == []


def test_the_share_of_one_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTCTL_WORKERS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert workers.workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.workers() == 2
