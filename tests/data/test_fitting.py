"""Rows longer than `max_length`: cut, split, left out or refused."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftctl.data.fitting import Encoded, fit
from peftctl.errors import DataError


def row(length: int, *spans: tuple[int, int]) -> Encoded:
    return Encoded(array("i", range(length)), spans)


def test_a_row_that_fits_is_itself() -> None:
    whole = row(7, (2, 5))
    for on_long in ("truncate", "split", "drop", "error"):
        assert fit(whole, 7, on_long, "rows:1") == [whole]


def test_pieces() -> None:
    pieces = fit(row(10, (1, 2), (3, 6)), 4, "split", "rows:1")
    assert [piece.input_ids for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [piece.spans for piece in pieces] == [((1, 2), (3, 4)), ((1, 2),)]  # nothing stands before token 4
    assert [(piece.piece, piece.pieces, piece.cut) for piece in pieces] == [(0, 3, 2), (1, 3, 0)]
    assert not any(piece.truncated for piece in pieces)


def test_pieces_without_a_trained_token_are_left_out() -> None:
    (last,) = fit(row(10, (9, 10)), 4, "split", "rows:1")
    assert (last.input_ids, last.spans, last.piece, last.cut) == ([8, 9], ((1, 2),), 2, 8)
    with pytest.raises(DataError, match="rows:1: nothing to train is left in any piece of 4 tokens"):
        fit(row(10, (4, 5), (8, 9)), 4, "split", "rows:1")


@given(st.data())
def test_splitting_loses_nothing_but_what_it_tells(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 40))
    trained = sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=1)))
    whole = row(length, *((at, at + 1) for at in trained))
    size = data.draw(st.integers(1, 12))
    try:
        pieces = fit(whole, size, "split", "rows:1")
    except DataError:
        pieces = []
    lost = {at for at in trained if at % size == 0 and length > size}  # each piece's first token predicts, only
    kept = [id for piece in pieces for id, label in zip(piece.ids, piece.labels, strict=True) if label != -100]
    assert kept == [at for at in trained if at not in lost]
    assert all(0 < len(piece) <= size and piece.trained for piece in pieces)
    if pieces:
        assert sum(map(len, pieces)) + sum(piece.cut for piece in pieces) == length


def test_the_other_ways() -> None:
    (cut,) = fit(row(10, (1, 2), (3, 6)), 4, "truncate", "rows:1")
    assert (cut.input_ids, cut.spans, cut.truncated, cut.cut) == ([0, 1, 2, 3], ((1, 2), (3, 4)), True, 6)
    assert fit(row(10, (1, 2)), 4, "drop", "rows:1") == []
    with pytest.raises(DataError, match="rows:1: 10 tokens, more than `max_length` 4"):
        fit(row(10, (1, 2)), 4, "error", "rows:1")
    with pytest.raises(DataError, match="nothing to train is left in the first 4 tokens"):
        fit(row(10, (4, 5)), 4, "truncate", "rows:1")
