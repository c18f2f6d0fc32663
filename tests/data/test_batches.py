from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftctl.data.batches import Layout, Part, collate, micro_batches, order, rows_per_epoch
from peftctl.data.encode import Encoded

EOS = 2
SHORT = Encoded(array("i", [5, 6, EOS]), ((1, 3),))
LONG = Encoded(array("i", [5, 6, EOS, 7, 8, EOS]), ((1, 3), (4, 6)))


@given(rows=st.integers(0, 200), batch=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_order_covers_every_row_once(rows: int, batch: int, seed: int, epoch: int) -> None:
    steps = order([Part(rows)], batch, seed, epoch)
    assert sorted(row for step in steps for row in step) == list(range(rows))
    assert all(len(step) == batch for step in steps[:-1])
    assert all(0 < len(step) <= batch for step in steps)


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    # Pinned: a run must see the same rows after an update of Python, torch or peftctl.
    assert order([Part(8)], 3, seed=0, epoch=0) == [[3, 1, 5], [7, 6, 0], [4, 2]]
    assert order([Part(5), Part(3)], 3, seed=0, epoch=0) == order([Part(8)], 3, seed=0, epoch=0)
    orders = {str(order([Part(50)], 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


PARTS = st.lists(st.builds(Part, st.integers(1, 20), st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.3])), min_size=1)


@given(parts=PARTS, seed=st.integers(0, 9))
def test_weights_say_how_often_rows_are_seen(parts: list[Part], seed: int) -> None:
    epochs = [[row for step in order(parts, 7, seed, epoch) for row in step] for epoch in range(8)]
    assert {len(rows) for rows in epochs} == {rows_per_epoch(parts)}
    start = 0
    for rows, weight in parts:
        counts = [[epoch.count(row) for row in range(start, start + rows)] for epoch in epochs]
        for epoch in counts:
            assert sum(epoch) == round(rows * weight)
            assert max(epoch) - min(epoch) <= 1
        seen = [sum(of_row) for of_row in zip(*counts, strict=True)]
        assert max(seen) - min(seen) <= 1, "epochs take turns"
        start += rows


def test_a_row_that_is_drawn_twice_is_there_twice() -> None:
    for packing in (None, "lines"):
        layout = Layout([SHORT, LONG], 4, pad_id=0, packing=packing)  # type: ignore[arg-type]
        parts = layout.micro_batches([0, 1, 0])
        assert sorted(row for part in parts for bin in part for row in bin) == [0, 0, 1]


@given(lengths=st.lists(st.integers(1, 99), max_size=40), micro=st.integers(1, 9), world=st.integers(1, 4))
def test_micro_batches_are_disjoint_and_complete_over_ranks(lengths: list[int], micro: int, world: int) -> None:
    rows = [row for row in range(len(lengths)) if row % 3]
    ranks = [micro_batches(rows, lengths, micro, rank, world) for rank in range(world)]
    assert sorted(row for batches in ranks for batch in batches for row in batch) == rows
    assert {len(batches) for batches in ranks} == {-(-len(rows) // (micro * world))}
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert all(size <= micro for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_micro_batches_group_by_length_and_share_equally() -> None:
    lengths = [3, 90, 4, 80, 5, 70, 6, 60]
    first, second = (micro_batches(range(8), lengths, 2, rank, 2) for rank in range(2))
    assert [[lengths[row] for row in batch] for batch in first] == [[90, 80], [6, 5]]
    assert [[lengths[row] for row in batch] for batch in second] == [[70, 60], [4, 3]]


def test_a_rank_without_rows_still_has_a_micro_batch() -> None:
    batches = [micro_batches([4], [1] * 5, 8, rank, 2) for rank in range(2)]
    assert sorted(map(str, batches)) == ["[[4]]", "[[]]"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_hides_a_stop_token(side: str) -> None:
    batch = collate([SHORT, LONG], pad_id=EOS, side=side)  # type: ignore[arg-type]
    pad = [EOS] * 3
    assert batch["input_ids"].tolist() == [[5, 6, EOS, *pad] if side == "right" else [*pad, 5, 6, EOS], LONG.input_ids]
    ones, zeros, none = [1, 1, 1], [0, 0, 0], [-100] * 3
    assert batch["attention_mask"].tolist() == [ones + zeros if side == "right" else zeros + ones, ones + ones]
    label = [-100, 6, EOS]
    assert batch["labels"].tolist() == [label + none if side == "right" else none + label, [-100, 6, EOS, -100, 8, EOS]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_lengths_are_rounded_up() -> None:
    assert collate([LONG], 0, multiple_of=8)["input_ids"].shape == (1, 8)
    assert collate([LONG], 0, multiple_of=6)["input_ids"].shape == (1, 6)


def test_no_rows_make_a_batch_that_trains_nothing() -> None:
    batch = collate([], pad_id=7, multiple_of=4)
    assert batch["input_ids"].tolist() == [[7] * 4]
    assert batch["attention_mask"].tolist() == [[1] * 4]
    assert batch["labels"].tolist() == [[-100] * 4]
