"""Medians, pairing and intervals, on times that are worked by hand."""

import pytest

from tests.bench import pairs
from tests.bench.pairs import Rounds, alternate, ratio, spread


def test_a_ratio_is_of_medians_not_of_means():
    found = ratio([1, 2, 3, 100, 2], [6, 6, 5, 7, 1000])
    assert found.value == 3.0  # 6 / 2, whatever the two outliers are
    assert found.low <= found.value <= found.high


def test_equal_rounds_leave_no_doubt():
    found = ratio([2.0] * 5, [6.0] * 5)
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)


def test_the_interval_holds_the_truth_and_says_when_nothing_is_known():
    sure = ratio([1.0, 1.01, 0.99, 1.02, 0.98], [2.0, 2.02, 1.98, 2.04, 1.96])
    assert 1.9 < sure.low <= 2.0 <= sure.high < 2.1
    unsure = ratio([1.0, 3.0, 0.5, 2.0, 1.0], [1.0, 0.6, 3.0, 1.0, 2.0])
    assert unsure.low < 1 < unsure.high


def test_rounds_that_are_slow_for_both_sides_stay_together():
    """The control: times of other rounds paired with these give a wider interval."""
    ours = [1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0]
    together, apart = ratio(ours, [2 * t for t in ours]), ratio(ours, [2 * t for t in ours[::-1]])
    assert (together.low, together.high) == (2.0, 2.0)
    shuffled = ratio(ours, [10.0, 2.0, 10.0, 2.0, 10.0, 2.0, 10.0])
    assert apart.value == 2.0 and shuffled.high > 2 * together.high


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)  # (4 - 2) / 3
    assert spread([7, 7, 7]) == 0 == spread([7])


def test_sides_take_turns_and_turns_are_reversed():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = alternate(sides, Rounds(most=4, warm_up=1))
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_no_round_begins_after_its_time_but_for_the_first_three():
    calls = []
    alternate({"a": lambda: calls.append(0)}, Rounds(most=50, seconds=-1.0, warm_up=0))
    assert len(calls) == 3


@pytest.mark.parametrize(("slow", "tries"), [(7.9, 2 + 5), (9.0, 2), (11.0, 1)])
def test_a_hopeless_side_is_timed_once(monkeypatch, slow, tries):
    """At 9 seconds a second try may show that only the first was slow; 11 are too many for that."""
    calls = []

    def seconds(work):
        calls.append(work())
        return calls[-1]

    monkeypatch.setattr(pairs, "seconds", seconds)
    times = alternate({"fast": lambda: 1.0, "slow": lambda: slow}, Rounds(most=5))
    assert times == {"fast": [1.0] * 5, "slow": [slow] * (5 if slow < 8 else 1)}
    assert calls.count(slow) == tries and calls.count(1.0) == 2 + 5


def test_what_was_timed_once_has_no_interval():
    found = ratio([1.0] * 5, [9.0])
    assert found.value > 8 and found.low is None is found.high
