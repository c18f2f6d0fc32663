"""Intervals cover what they say, on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftctl.evaluation.bootstrap import DRAWS, FEWEST, UNKNOWN, interval, resampled, share, tail
from peftctl.evaluation.metric import Array
from peftctl.evaluation.metrics import METRICS
from peftctl.evaluation.sheet import Sheet

TRIALS = 200


def mean(values: Array) -> Array:
    return np.stack([values, np.ones_like(values)], axis=1)


@pytest.mark.parametrize("rows", [12, 60])
def test_the_truth_lies_inside_about_19_times_of_20(rows: int):
    rng, inside = np.random.default_rng(1), 0
    for _ in range(TRIALS):
        low, high = interval(METRICS["loss"].figure(resampled(mean(rng.normal(2, 1, rows)))), rows)
        inside += low < 2 < high
    assert 0.91 <= inside / TRIALS <= 0.985


def test_the_truth_of_a_ratio_lies_inside():
    rng, inside = np.random.default_rng(2), 0
    for _ in range(TRIALS):
        tokens = rng.integers(1, 30, 80).astype(float)
        nats = tokens * rng.gamma(4, 0.5, 80)  # 2 nats a token
        low, high = interval(METRICS["loss"].figure(resampled(np.stack([nats, tokens], axis=1))), 80)
        inside += low < 2 < high
    assert 0.90 <= inside / TRIALS <= 0.985


def test_pairing_is_narrower_and_still_covers():
    rng, paired, unpaired, inside = np.random.default_rng(3), 0.0, 0.0, 0
    for _ in range(100):
        hard = rng.normal(3, 1, 50)  # what makes rows hard for both
        one, two = (mean(hard + rng.normal(shift, 0.2, 50)) for shift in (0.1, 0))
        sheet = Sheet(rows=[str(i) for i in range(50)], statistics={"a": {"loss": one}, "b": {"loss": two}})
        low, high = sheet.difference("a", "b", "loss").interval
        inside += low < 0.1 < high
        paired += high - low
        # the same rows, paired with others: nothing cancels
        sheet = Sheet(rows=sheet.rows, statistics={"a": {"loss": one}, "b": {"loss": rng.permutation(two)}})
        low, high = sheet.difference("a", "b", "loss").interval
        unpaired += high - low
    assert paired < 0.4 * unpaired
    assert inside >= 90


def test_draws_hang_on_the_number_of_rows_alone():
    rng = np.random.default_rng(4)
    one, two = rng.normal(size=(40, 2)), rng.normal(size=(40, 3))
    both = resampled(np.concatenate([one, two], axis=1))
    assert both.shape == (DRAWS, 5)
    np.testing.assert_allclose(both[:, :2], resampled(one), atol=1e-9)
    np.testing.assert_allclose(both[:, 2:], resampled(two), atol=1e-9)


def test_memory_does_not_grow_with_rows(monkeypatch: pytest.MonkeyPatch):
    statistics = np.random.default_rng(5).normal(size=(300, 2))
    whole = resampled(statistics)
    monkeypatch.setattr("peftctl.evaluation.bootstrap.AT_ONCE", 1000)
    np.testing.assert_allclose(resampled(statistics), whole, atol=1e-9)


@pytest.mark.parametrize(("rows", "t"), [(6, 2.5706), (10, 2.2622), (30, 2.0452), (1000, 1.9623)])
def test_few_rows_are_taken_further_out_by_students_t(rows: int, t: float):
    expected = 0.5 * math.erfc(math.sqrt(rows / (rows - 1)) * t / math.sqrt(2))
    assert tail(rows) == pytest.approx(expected, rel=0.1)


def test_too_few_rows_have_no_interval():
    assert interval(np.ones(DRAWS), FEWEST - 1) == UNKNOWN
    assert interval(np.full(DRAWS, np.nan), 50) == UNKNOWN
    assert share(1, FEWEST - 1) == UNKNOWN


def test_a_share_of_all_rows_or_none_has_a_width():
    # Wilson (1927): for 10 of 10 the lower end is n / (n + z^2)
    assert share(10, 10) == pytest.approx((10 / (10 + 1.959964**2), 1), abs=1e-6)
    assert share(0, 10) == pytest.approx((0, 1.959964**2 / (10 + 1.959964**2)), abs=1e-6)
    sheet = Sheet(rows=["x"] * 10, statistics={"a": {"accuracy": np.ones((10, 2))}})
    assert sheet.figure("a", "accuracy").interval.low < 0.73
