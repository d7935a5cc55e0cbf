"""How many steps fit the time budget: measure real steps, fix a number, write it down.

    lm train stdlib train.budget=5m      12 steps measured → 640 planned → schedule ends in time

What a run takes in all, before it is started, is told by `engine/forecast.py`.

The plan is a file of the run, so a resumed run follows the same plan to the bit. A machine that
turns out faster or slower corrects it, as long as a warm-up–stable–decay schedule is in its stable
part, where past steps do not depend on the total. Once the rate falls, the number of steps stands.
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

MEASURED = 12  # steps before the first plan
WARM_UP = 3  # of them, left out: first-touch memory, lazy initialisation
WINDOW = 50  # the newest steps, which a correction is based on
CORRECTIONS = 8  # at most, of the first plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A decision: from step `at` on, the run is `steps` long."""

    at: int
    steps: int
    seconds_per_step: float


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
        return known[-1] if known else 1 << 40  # not yet measured: nothing has to end

    def known(self, step: int) -> bool:
        """Tell whether the run's length is known at `step`."""
        return bool(self.config.steps) or any(plan.at <= step for plan in self.plans)

    def due(self, step: int) -> bool:
        """Tell whether a decision is to be made after `step` updates."""
        if self.config.steps or any(plan.at == step for plan in self.plans):
            return False
        if not self.plans:  # also when a process died between a step and its plan
            return step >= MEASURED and len(self.recent) >= MEASURED
        if self.config.schedule.name != "wsd" or len(self.recent) < MEASURED:
            return False
        first, newest = self.plans[0], self.plans[-1]
        interval = max(
            MEASURED, round(first.steps * (1 - self.config.schedule.decay) / CORRECTIONS)
        )
        # With room for a total that shrinks: the rate must not have begun to fall under it either.
        stable = 0.8 * newest.steps * (1 - self.config.schedule.decay)
        return step >= newest.at + interval and step < stable

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
        if self.plans:  # what is behind stays behind the point where the rate falls
            steps = max(steps, math.ceil(step / (1 - self.config.schedule.decay)) + 1)
        plan = Plan(at=step, steps=steps, seconds_per_step=each)
        self.plans.append(plan)
        write_whole(self.path, json.dumps([asdict(each) for each in self.plans]) + "\n")
        return plan
