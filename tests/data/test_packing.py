"""Bins are nearly as few as can be and hold each row once; packed lines tell where rows begin, and train none there."""

from __future__ import annotations

from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from peftctl.data.batches import Layout
from peftctl.data.encode import Encoded
from peftctl.data.packing import best_fit, collate_packed

CPU = torch.device("cpu")


def row(*ids: int, trained: int = 1) -> Encoded:
    return Encoded(array("i", ids), ((trained, len(ids)),))


def fewest(lengths: list[int], capacity: int) -> int:
    """The fewest bins, by trying every bin for every row."""
    best = len(lengths)

    def place(index: int, bins: tuple[int, ...]) -> None:
        nonlocal best
        if len(bins) >= best:
            return
        if index == len(lengths):
            best = len(bins)
            return
        for i in {load: i for i, load in enumerate(bins)}.values():
            if bins[i] + lengths[index] <= capacity:
                place(index + 1, (*bins[:i], bins[i] + lengths[index], *bins[i + 1 :]))
        place(index + 1, (*bins, lengths[index]))

    place(0, ())
    return best


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=10), spare=st.integers(0, 20))
def test_bins_are_few_and_hold_every_row_once(lengths: list[int], spare: int):
    capacity = max(lengths) + spare
    bins = best_fit(range(len(lengths)), lengths, capacity)
    assert sorted(index for bin in bins for index in bin) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in bin) <= capacity for bin in bins)
    assert len(bins) <= 11 / 9 * fewest(sorted(lengths, reverse=True), capacity) + 6 / 9


def test_the_fullest_bin_with_room_is_taken_and_the_oldest_of_several():
    # Pinned: a run goes on as it began after an update of peftctl.
    assert best_fit(range(6), [6, 5, 4, 3, 2, 1], 8) == [[0, 4], [1, 3], [2, 5]]
    assert best_fit([4, 2, 0], {4: 5, 2: 5, 0: 3}, 9) == [[2, 0], [4]]
    assert best_fit([], [], 8) == []


def test_many_rows_fill_their_bins():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 500, (20_000,), generator=draw).tolist()
    assert len(best_fit(range(len(lengths)), lengths, 2048)) <= 1.001 * sum(lengths) / 2048 + 1


def test_lines_restart_at_every_row_and_train_no_first_token():
    batch = collate_packed([[row(5, 6, 7), row(8, 9, trained=0)], [row(4, 3, 2, trained=2)]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, -100, 2, -100, -100]]
    assert batch.keys() == {"input_ids", "position_ids", "labels"}, "a mask would hide where rows begin"
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_flat_line_has_no_padding():
    batch = collate_packed([[row(5, 6, 7), row(8, 9)], [row(4, 3)]], pad_id=0, flat=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]


def test_no_rows_make_a_line_that_trains_nothing():
    for flat in (False, True):
        batch = collate_packed([], pad_id=7, flat=flat)
        assert batch["input_ids"].tolist() == [[7, 7]]
        assert batch["position_ids"].tolist() == [[0, 1]]
        assert batch["labels"].tolist() == [[-100, -100]]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    micro=st.integers(1, 9),
    world=st.integers(1, 4),
    packing=st.sampled_from([None, "lines", "flat"]),
)
def test_every_row_of_a_step_is_in_one_micro_batch_of_one_rank(lengths, micro, world, packing):
    rows = [row(*range(length)) for length in lengths]
    layout = Layout(rows, micro, 0, packing)
    chosen = list(range(len(rows)))[::-1]
    ranks = [layout.micro_batches(chosen, rank, world) for rank in range(world)]
    assert sorted(i for parts in ranks for part in parts for bin in part for i in bin) == chosen[::-1]
    assert len({len(parts) for parts in ranks}) == 1
    for part in (part for parts in ranks for part in parts if part):
        batch = layout.batch(part, CPU)
        assert len(part) <= micro
        assert layout.shape(part) == batch["input_ids"].shape
        assert batch["input_ids"].numel() <= micro * max(lengths), "more memory than the longest rows take"
        assert int((batch["labels"] != -100).sum()) == sum(lengths[i] - 1 for bin in part for i in bin)
