"""The plan that turns a time budget into steps."""

from itertools import pairwise

import pytest

from engine.config import ScheduleConfig, TrainConfig
from engine.train.plan import MEASURED, Planner
from engine.train.schedule import lr_factor


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
    due = [step for step in range(MEASURED + 1, steps) if planner._is_stable(step)]
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
            began = 0.5 * min(before, planner.steps(step))
            assert step < began or planner.plans[-1].bends, "the rate had begun to fall"
    assert step < first / 2 and elapsed < 230


def simulate(planner: Planner, seconds, budget: float) -> tuple[float, list[float]]:
    """Take a whole run whose step k takes seconds(k); return its time and its rates."""
    step, elapsed, rates = MEASURED, 0.1 * MEASURED, []
    planner.decide(step, elapsed, other=0)
    while step < planner.steps(step):
        rates.append(planner.factor(step))
        each = seconds(elapsed / budget)
        step, elapsed = step + 1, elapsed + each
        planner.observe(each)
        if planner.due(step):
            planner.decide(step, elapsed, other=0)
    return elapsed, rates


SLOWER = {"from half on": (0.5, 0.2), "from the middle of the fall": (0.7, 0.25)}
FASTER = {"from half on": (0.5, 0.05), "from the middle of the fall": (0.75, 0.04)}


@pytest.mark.parametrize("since, then", [*SLOWER.values(), *FASTER.values()])
@pytest.mark.parametrize("name", ["wsd", "cosine"])
def test_a_machine_that_changes_while_the_rate_falls_is_followed(tmp_path, name, since, then):
    """A run of five minutes took 28 seconds more: once the rate fell, its length stood.

    The rate goes on from where it was, in small steps downwards, and ends near zero.
    """
    settings = {"budget": "100s", "schedule": ScheduleConfig(name=name, warmup=0)}

    def seconds(gone: float) -> float:
        return 0.1 if gone < since else then

    planner = measured(tmp_path, 0.1, **settings)
    elapsed, rates = simulate(planner, seconds, 100)
    assert 96 < elapsed < 106
    falls = [before - after for before, after in pairwise(rates)]
    assert min(falls) > -1e-9 and max(falls) < 0.02 and 0 < rates[-1] < 0.02
    resumed = Planner(TrainConfig(**settings), tmp_path / "plan.json")
    steps = range(MEASURED, MEASURED + len(rates))
    assert [resumed.factor(step) for step in steps] == rates
    assert not any(resumed.due(plan.at) for plan in planner.plans)


@pytest.mark.parametrize("since, then", SLOWER.values())
def test_a_plan_that_stands_overruns(tmp_path, monkeypatch, since, then):
    """The control: as it was, without corrections in the fall."""
    monkeypatch.setattr(Planner, "due", lambda self, step: self._is_stable(step) and step % 50 == 0)
    planner = measured(tmp_path, 0.1, budget="100s", schedule=ScheduleConfig(decay=0.5))
    assert simulate(planner, lambda gone: 0.1 if gone < since else then, 100)[0] > 120


def test_a_machine_that_stands_still_does_not_end_the_run_with_a_high_rate(tmp_path):
    """A minute is lost at once: the rest is shortened, but walked to its end."""
    planner = measured(tmp_path, 0.1, budget="100s", schedule=ScheduleConfig(decay=0.5))
    lost = iter([60.0])
    elapsed, rates = simulate(planner, lambda gone: 0.1 if gone < 0.7 else next(lost, 0.1), 100)
    assert rates[-1] < 0.05 and 130 < elapsed < 160


def test_a_schedule_without_a_plan_is_that_of_its_steps(tmp_path):
    config = TrainConfig(steps=50, schedule=ScheduleConfig(warmup=5))
    planner = Planner(config, tmp_path / "plan.json")
    expected = [lr_factor(step, 50, config.schedule) for step in range(50)]
    assert [planner.factor(step) for step in range(50)] == expected
