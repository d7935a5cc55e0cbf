"""A clock whose stages add up, and one that measures nothing."""

import pickle
import time

import pytest

from engine.clock import IDLE, Clock


def test_stages_leave_no_gap_and_repeat():
    clock = Clock()
    began = clock.latest
    for _ in range(3):
        time.sleep(0.01)
        clock.lap("a")
        clock.lap("b")
    assert set(clock.seconds) == {"a", "b"}
    assert clock.seconds["a"] > 0.03 > clock.seconds["b"]
    assert sum(clock.seconds.values()) == pytest.approx(clock.latest - began)
    clock.start()
    assert clock.seconds == {} and clock.latest > began


def test_an_idle_clock_stays_empty_wherever_it_is_sent():
    for clock in (IDLE, pickle.loads(pickle.dumps(IDLE))):
        clock.lap("a")
        assert clock.seconds == {}
