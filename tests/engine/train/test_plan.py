"""The plan that turns a time budget into steps."""

import pytest

from engine.config import ScheduleConfig, TrainConfig
from engine.train.plan import MEASURED, Planner


def measured(tmp_path, seconds: float, **settings) -> Planner:
    planner = Planner(TrainConfig(**settings), tmp_path / "plan.json")
    for _ in range(MEASURED):
        planner.observe(seconds)
    return planner


def test_steps_that_are_given_need_no_plan(tmp_path):
    planner = Planner(TrainConfig(steps=7), tmp_path / "plan.json")
    assert planner.steps(0) == 7 and planner.known(0)
    assert not any(planner.due(step) for step in range(100))


def test_the_plan_fills_the_budget(tmp_path):
    """100 s, of which 6 are gone and 4 are for other things, at half a second a step."""
    planner = measured(tmp_path, 0.5, budget="100s")
    assert not planner.known(MEASURED) and planner.due(MEASURED)
    plan = planner.decide(MEASURED, elapsed=6, other=4)
    assert plan.steps == MEASURED + 180
    assert planner.steps(MEASURED) == plan.steps and not planner.due(MEASURED)


def test_slow_first_steps_do_not_count(tmp_path):
    planner = Planner(TrainConfig(budget="100s"), tmp_path / "plan.json")
    for seconds in [9, 5, 2] + [0.5] * (MEASURED - 3):
        planner.observe(seconds)
    assert planner.decide(MEASURED, elapsed=0, other=0).seconds_per_step == pytest.approx(0.5)


def test_a_resumed_run_follows_the_same_plan(tmp_path):
    """Also from a step before the correction: it is the plan of its time that counts."""
    settings = {"budget": "100s", "schedule": ScheduleConfig(decay=0.5)}
    first = measured(tmp_path, 0.1, **settings)
    first.decide(MEASURED, elapsed=2, other=0)
    due = next(step for step in range(MEASURED + 1, 2000) if first.due(step))
    for _ in range(200):
        first.observe(0.2)  # the machine got slower
    second_plan = first.decide(due, elapsed=30, other=0)
    again = Planner(TrainConfig(**settings), tmp_path / "plan.json")
    assert again.plans == first.plans
    assert again.steps(MEASURED) == first.plans[0].steps > second_plan.steps == again.steps(due)
    assert not again.due(MEASURED) and not again.due(due)


def test_the_correction_comes_before_anything_falls(tmp_path):
    """The schedule's past must not depend on the new total: still in the stable part."""
    planner = measured(tmp_path, 0.1, budget="100s", schedule=ScheduleConfig(decay=0.6))
    steps = planner.decide(MEASURED, elapsed=0, other=0).steps
    due = [step for step in range(MEASURED + 1, steps) if planner.due(step)]
    assert due and due[-1] < steps * 0.4


def test_a_machine_that_slows_down_is_followed(tmp_path):
    """Four times slower from the first plan on: the later plans shrink the run to fit."""
    planner = measured(tmp_path, 0.1, budget="200s", schedule=ScheduleConfig(decay=0.5))
    first = planner.decide(MEASURED, elapsed=2, other=0).steps
    step, elapsed = MEASURED, 2.0
    while step < planner.steps(step):
        step, elapsed = step + 1, elapsed + 0.4
        planner.observe(0.4)
        if planner.due(step):
            before = planner.steps(step)
            planner.decide(step, elapsed, other=0)
            assert step < 0.5 * min(before, planner.steps(step)), "the rate had begun to fall"
    assert step < first / 2 and elapsed < 230


def test_a_cosine_is_never_corrected(tmp_path):
    planner = measured(tmp_path, 0.1, budget="100s", schedule=ScheduleConfig(name="cosine"))
    steps = planner.decide(MEASURED, elapsed=0, other=0).steps
    assert not any(planner.due(step) for step in range(MEASURED + 1, steps))
