from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftctl.data import texts
from peftctl.data.dataset import Dataset
from peftctl.data.held_out import hold_out
from peftctl.data.prepare import prepare
from peftctl.data.texts import Texts
from peftctl.errors import DataError


@pytest.fixture
def both(tmp_path: Path, write: Callable[..., Path], tokenizer_of: Callable[[str], Any]) -> tuple[Any, Texts]:
    """Rows of two sources with their texts in memory, and the same texts where they lie."""
    for name in ("a", "b"):
        write(*({"prompt": f"{name}{i}?", "completion": f"{i}" * (1 + i % 5)} for i in range(10)), name=f"{name}.jsonl")
    spec: Any = ["a.jsonl", "b.jsonl"]
    dataset = Dataset(train=spec, max_length=8, on_long="split")
    prepared = prepare(spec, dataset, tokenizer_of("chatml"), tmp_path, keep_parsed=True)
    return prepared, Texts(spec, prepared.formats, dataset, tmp_path, prepared.ledger.kept)


def test_texts_are_the_rows_in_their_order(both: tuple[Any, Texts]) -> None:
    prepared, lying = both
    assert len(lying) == 20
    assert list(lying) == list(prepared.parsed)
    assert [lying[i] for i in (19, 0, 7)] == [prepared.parsed[i] for i in (19, 0, 7)]
    assert list(lying[5:8]) == prepared.parsed[5:8]
    assert lying[5:8][2] == prepared.parsed[7]
    assert list(lying.chosen([2, 3, 11])[1:]) == [prepared.parsed[3], prepared.parsed[11]]


def test_texts_are_held_out_with_their_rows(both: tuple[Any, Texts]) -> None:
    prepared, lying = both
    for part, same in zip(hold_out(prepared, 0.3, 0), hold_out(replace(prepared, parsed=lying), 0.3, 0), strict=True):
        assert list(same.parsed) == list(part.parsed)


def test_many_are_loaded_in_one_pass(both: tuple[Any, Texts], monkeypatch: pytest.MonkeyPatch) -> None:
    _, lying = both
    passes = []
    read = texts.examples
    monkeypatch.setattr(texts, "examples", lambda one, *rest, **how: passes.append(one.path) or read(one, *rest, **how))
    lying.load([3, 9])
    assert passes == ["a.jsonl"]  # nothing behind the last one is read
    assert [lying[9].place, lying[3].place] == ["a.jsonl:10", "a.jsonl:4"]
    assert passes == ["a.jsonl"]


def test_rows_that_are_no_longer_there(both: tuple[Any, Texts], tmp_path: Path) -> None:
    _, lying = both
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="the data changed while it was read"):
        lying.load([15])
    with pytest.raises(DataError, match="the data changed while it was read"):
        list(lying)
