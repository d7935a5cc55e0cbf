"""How many steps fit the time budget: measure real steps, fix a number, write it down.

    lm train stdlib train.budget=5m      12 steps measured → 640 planned → schedule ends in time

What a run takes in all, before it is started, is told by `engine/forecast.py`.

The plan is a file of the run, so a resumed run follows the same plan to the bit. A machine that
turns out faster or slower corrects it. While a warm-up–stable–decay schedule is in its stable part,
past steps do not depend on the total, and a new one is set. From then on, and in other schedules,
the total of the schedule stands, and a correction walks through the rest of it faster or slower:
the rate goes on where it was, and reaches its end in time.
"""

import json
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import TrainConfig
from engine.files import write_whole
from engine.recipe import duration
from engine.train.schedule import ENDLESS, lr_factor

MEASURED = 12  # steps before the first plan
WARM_UP = 3  # of them, left out: first-touch memory, lazy initialisation
WINDOW = 50  # the newest steps, which a correction is based on
CORRECTIONS = 16  # about; more of them near the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A decision: from step `at` on, the run is `steps` long."""

    at: int
    steps: int
    seconds_per_step: float
    bends: bool = False  # the schedule keeps its length, and is walked through at another pace


class Planner:
    """Knows the length of a run: given, planned earlier, or to be planned from measured steps."""

    def __init__(self, config: TrainConfig, path: Path) -> None:
        """Continue the plan at `path` if there is one."""
        self.config, self.path = config, path
        self.plans: list[Plan] = []
        self.recent: deque[float] = deque(maxlen=WINDOW)
        if path.is_file():
            self.plans = [Plan(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def steps(self, step: int) -> int:
        """Return the run's length as far as it is known at `step`."""
        if self.config.steps:
            return self.config.steps
        known = [plan.steps for plan in self.plans if plan.at <= step]
        return known[-1] if known else ENDLESS  # not yet measured: nothing has to end

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rates in update `step`."""
        return lr_factor(*self._place(step), self.config.schedule)

    def _place(self, step: int) -> tuple[float, int]:
        """Return where in its schedule update `step` is, and how long the schedule is."""
        at, place, pace, length = 0, 0.0, 1.0, self.config.steps or ENDLESS
        for plan in self.plans:
            if plan.at > step or self.config.steps:
                break
            at, place = plan.at, place + pace * (plan.at - at)
            if plan.bends:
                pace = (length - place) / (plan.steps - at)
            else:
                length = plan.steps
        return place + pace * (step - at), length

    def known(self, step: int) -> bool:
        """Tell whether the run's length is known at `step`."""
        return bool(self.config.steps) or any(plan.at <= step for plan in self.plans)

    def due(self, step: int) -> bool:
        """Tell whether a decision is to be made after `step` updates."""
        if self.config.steps or any(plan.at == step for plan in self.plans):
            return False
        if len(self.recent) < MEASURED:
            return False
        if not self.plans:  # also when a process died between a step and its plan
            return step >= MEASURED
        first, newest = self.plans[0], self.plans[-1]
        interval = min(first.steps // CORRECTIONS, (newest.steps - newest.at) // 2)
        return newest.at + max(MEASURED, interval) <= step < newest.steps

    def observe(self, seconds: float) -> None:
        """Note how long a step took."""
        self.recent.append(seconds)

    def decide(self, step: int, elapsed: float, other: float, extra: float = 0.0) -> Plan:
        """Fix the number of steps, leaving `other` seconds for what is not training.

        `extra` seconds come on top of each step, for evaluations that come every so many steps.

        The plan is on disk before the next step is taken.
        """
        steady = list(self.recent)[WARM_UP:] if len(self.recent) == MEASURED else self.recent
        each = statistics.fmean(steady) + extra
        left = duration(self.config.budget) - elapsed - other
        steps = step + max(1, int(left / each))
        bends = bool(self.plans) and not self._is_stable(step)
        if bends:  # an end that comes at once would leave the rate high
            steps = max(steps, step + math.ceil((self.steps(step) - step) / 2))
        elif self.plans:  # what is behind stays behind the point where the rate falls
            steps = max(steps, math.ceil(step / (1 - self.config.schedule.decay)) + 1)
        plan = Plan(at=step, steps=steps, seconds_per_step=each, bends=bends)
        self.plans.append(plan)
        write_whole(self.path, json.dumps([asdict(each) for each in self.plans]) + "\n")
        return plan

    def _is_stable(self, step: int) -> bool:
        """Tell whether another total, a shorter one too, changes no rate of the past."""
        place, length = self._place(step)
        schedule = self.config.schedule
        return schedule.name == "wsd" and place < 0.8 * length * (1 - schedule.decay)
