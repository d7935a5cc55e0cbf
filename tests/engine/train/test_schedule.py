"""The learning rate at every step, against tables worked out by hand."""

import itertools
import math

import pytest

from engine.config import ScheduleConfig
from engine.train.schedule import SCHEDULES, lr_factor


def factors(steps: int, **settings) -> list[float]:
    config = ScheduleConfig(**settings)
    return [lr_factor(step, steps, config) for step in range(steps)]


def test_wsd_warms_up_stays_and_falls_in_a_line():
    """The ten-step table that torchtitan's tests hold its scheduler to."""
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert factors(10, warmup=2, decay=0.5) == pytest.approx(expected)


def test_wsd_falls_to_the_floor():
    last = factors(10, warmup=0, decay=0.5, floor=0.1)[-1]
    assert last == pytest.approx(0.1 + 0.9 / 5)


def test_warmup_longer_than_the_run():
    assert factors(5, warmup=10, decay=0) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_cosine_is_half_way_down_in_the_middle():
    found = factors(100, name="cosine", warmup=0)
    assert found[50] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert found[99] == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2) and found[99] > 0
    assert all(a > b for a, b in itertools.pairwise(found))


def test_constant_is_constant_after_the_warmup():
    assert factors(6, name="constant", warmup=3)[2:] == [1, 1, 1, 1]


def test_every_named_schedule_exists():
    named = ScheduleConfig.__dataclass_fields__["name"].type.__args__
    assert set(SCHEDULES) == set(named)
