from __future__ import annotations

from cli.steps import Clock, step

from peftctl.cli.pace import Pace, duration, quantity, rate


def test_the_trend_of_the_loss():
    pace = Pace(Clock())
    assert [pace.hear(step(n, 99, loss=1.0)) or pace.trend for n in range(1, 4)] == [0, 0, 0]
    pace.hear(step(4, 99, loss=2.0))
    assert pace.trend == 1
    for number in range(5, 40):
        pace.hear(step(number, 99, loss=0.5))
    assert pace.trend == -1
    pace.hear(step(40, 99, loss=float("nan")))
    assert pace.trend == 0


def test_the_time_left_counts_evaluations_and_falls_while_a_step_lasts():
    clock = Clock()
    pace = Pace(clock)
    pace.hear(step(11, 21, seconds=2.0))  # resumed: the steps before it took no time here
    assert pace.seconds_left == 20
    clock.now += 6  # a step of 2 s, after an evaluation of 4 s
    pace.hear(step(12, 21, seconds=2.0))
    assert pace.seconds_left == 9 * (2 + 6) / 2
    clock.now += 5
    assert pace.seconds_left == 31
    assert pace.tokens_per_second == 300
    clock.now += 500
    assert pace.seconds_left == 0


def test_numbers_in_few_characters():
    assert [duration(s) for s in (0, 7.4, 59.6, 3599, 3600, 90_061)] == [
        "0:00", "0:07", "1:00", "59:59", "1:00:00", "1 d 01:01:01"
    ]  # fmt: skip
    assert [rate(r) for r in (0, 2e-4, 1.25e-5, 1, 3.14159e-3)] == ["0", "2e-4", "1.25e-5", "1e0", "3.14e-3"]
    assert [quantity(n) for n in (3.14, 940, 1240, 9999.4, 9999.6, 12_400, 3_140_000)] == [
        "3.1", "940", "1,240", "9,999", "10.0k", "12.4k", "3.1M"
    ]  # fmt: skip
