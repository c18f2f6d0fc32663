"""Gates fail for a model that is worse, and never by chance, by the order of rows or by nonsense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peftctl.data.formats import Pair
from peftctl.evaluation.evaluation import Evaluation
from peftctl.evaluation.gate import Gate
from peftctl.evaluation.judge import judged
from peftctl.evaluation.metric import Array, Seen
from peftctl.evaluation.metrics import METRICS
from peftctl.evaluation.sheet import Sheet


def hits(right: int, rows: int) -> Array:
    return np.stack([np.arange(rows) < right, np.ones(rows)], axis=1).astype(float)


def sheet(adapter: Array, base: Array, metric: str = "accuracy") -> Sheet:
    rows = [f"{i:04}" for i in range(len(adapter))]
    return Sheet(rows=rows, statistics={"base": {metric: base}, "adapter": {metric: adapter}})


def status(one: Sheet, metric: str = "accuracy", **limits: Any) -> str:
    [verdict] = judged({"": one}, {metric: Gate(**limits)}, "adapter")
    return verdict.status


@pytest.mark.parametrize(
    ("right", "expected"),
    [(95, "passed"), (90, "passed"), (87, "passed, not certain"), (60, "failed")],
)
def test_a_least_figure(right: int, expected: str):
    assert status(sheet(hits(right, 100), hits(50, 100)), min=0.9) == expected


@pytest.mark.parametrize(
    ("right", "expected"),
    [(85, "passed"), (80, "passed"), (78, "passed"), (77, "passed, not certain"), (50, "failed")],
)
def test_a_largest_drop(right: int, expected: str):
    assert status(sheet(hits(right, 100), hits(80, 100)), max_drop=0.02) == expected


@pytest.mark.parametrize(("factor", "expected"), [(0.9, "passed"), (1.04, "passed"), (1.2, "failed")])
def test_a_largest_ratio(factor: float, expected: str):
    rng = np.random.default_rng(0)
    base = np.stack([rng.gamma(4, 1, 80), np.full(80, 3.0)], axis=1)
    worse = base * [factor, 1] * np.stack([rng.normal(1, 0.02, 80), np.ones(80)], axis=1)
    one = sheet(worse, base, "loss")
    assert status(one, "loss", max_ratio=1.05) == expected
    assert status(one, "loss", max_rise=0.05) == ("failed" if factor == 1.2 else "passed")


def test_few_rows_fail_nothing():
    assert status(sheet(hits(0, 5), hits(5, 5)), min=0.9) == "passed, not certain"
    assert status(sheet(hits(0, 5), hits(5, 5)), max_drop=0.0) == "passed, not certain"


def test_a_figure_that_is_no_number_fails():
    lost = np.full((20, 2), np.nan)
    for limits in ({"max": 3.0}, {"max_ratio": 1.05}, {"max_rise": 0.1}):
        [verdict] = judged({"": sheet(lost, hits(9, 20), "loss")}, {"loss": Gate(**limits)}, "adapter")
        assert verdict.status == "failed"
        assert "not a number" in verdict.words


def test_rounding_is_no_miss():
    assert 0.8 - 0.7 > 0.1
    assert status(sheet(hits(7, 10), hits(8, 10)), max_drop=0.1) == "passed"


def test_noise_does_not_fail_and_a_worse_model_does():
    """Two models of one quality differ by chance; one that is much worse is found."""
    rng = np.random.default_rng(7)
    failed = {0.0: 0, 0.3: 0}
    for worse in failed:
        for _ in range(60):
            one, two = (np.stack([rng.random(60) < p, np.ones(60)], axis=1).astype(float) for p in (0.8 - worse, 0.8))
            failed[worse] += status(sheet(one, two), max_drop=0.02) == "failed"
    assert failed[0.0] <= 3
    assert failed[0.3] >= 45


def test_the_order_of_rows_changes_nothing():
    rng = np.random.default_rng(8)
    rows = [Pair(f"f:{i}", f"question {i}", "x") for i in range(30)]
    nats, tokens = rng.gamma(3, 1, (2, 30)), np.full(30, 2.0)

    def judge(order: list[int]) -> Any:
        seen = {
            model: Seen(nats=nats[m][order], tokens=tokens, right=tokens) for m, model in enumerate(("base", "adapter"))
        }
        moved = [Pair(f"g:{n}", rows[i].prompt, "x") for n, i in enumerate(order)]  # the place does not count
        one = Sheet.of(moved, seen, [METRICS["loss"]])
        return judged({"": one}, {"loss": Gate(max_ratio=1.01, max=1.4)}, "adapter")

    first = judge(list(range(30)))
    assert [judge(rng.permutation(30).tolist()) for _ in range(3)] == [first] * 3


def test_gates_hold_for_every_set_or_for_one():
    sets = {"easy": sheet(hits(95, 100), hits(50, 100)), "hard": sheet(hits(40, 100), hits(60, 100))}
    gates = {"accuracy": Gate(min=0.3), "hard/accuracy": Gate(min=0.8, max_drop=0.05)}
    found = {one.name: one.status for one in judged(sets, gates, "adapter")}
    assert found == {
        "easy/accuracy min 0.3": "passed",
        "hard/accuracy min 0.3": "passed",
        "hard/accuracy min 0.8": "failed",
        "hard/accuracy max_drop 0.05 against base": "failed",
    }


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"loss": {"max_drop": 0.1}}, "gates.loss: `max_drop`: of loss less is better; hint: did you mean `max_rise`"),
        ({"bleu": {"max": 3}}, "gates.bleu: `max`: of bleu more is better; hint: did you mean `min`"),
        ({"chrf": {"max_ratio": 3}}, "did you mean `min_ratio`"),
        ({"los": {"max": 3}}, "no metric with a figure is called `los`; hint: did you mean `loss`"),
        ({"confusion": {"min": 3}}, "no metric with a figure is called `confusion`"),
    ],
)
def test_gates_that_make_no_sense(gates: dict[str, Any], message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Evaluation(gates={key: Gate(**limits) for key, limits in gates.items()})
    assert message in str(caught.value)


def test_limits_that_make_no_sense():
    with pytest.raises(ValueError, match="a gate without a limit"):
        Gate()
    with pytest.raises(ValueError, match="`against` without a limit that compares"):
        Gate(min=1.0, against="base")
