"""The learning rate as a pure function of the step, as a factor of its peak.

Warm-up, then: stable and a linear fall at the end (wsd), half a cosine, or constant. The first step
already moves (factor 1/warmup, not 0) and the last one is still above the floor.

Sources: Hu et al. 2024, arXiv:2404.06395 (warm-up–stable–decay); Loshchilov & Hutter 2017,
arXiv:1608.03983 (cosine).
"""

import math

from engine.config import ScheduleConfig

ENDLESS = 1 << 40  # steps of a run whose length nobody knows yet


def lr_factor(step: float, steps: int, config: ScheduleConfig) -> float:
    """Return the factor for update number `step` (from 0) of a run of `steps` updates.

    A run that changes its pace may stand between two steps of its schedule.
    """
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return rise * SCHEDULES[config.name](step, steps, config)


def wsd(step: float, steps: int, config: ScheduleConfig) -> float:
    """Stay at the peak, then fall in a straight line over the last `decay` share of the run."""
    falling = round(config.decay * steps)
    left = steps - step  # above 0
    return 1.0 if left > falling else config.floor + (1 - config.floor) * left / falling


def cosine(step: float, steps: int, config: ScheduleConfig) -> float:
    """Follow half a cosine from the end of the warm-up to the end of the run."""
    after = max(1, steps - config.warmup)
    done = min(1.0, max(0, step - config.warmup) / after)
    return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * done)) / 2


def constant(step: float, steps: int, config: ScheduleConfig) -> float:
    """Stay at the peak."""
    return 1.0


SCHEDULES = {"wsd": wsd, "cosine": cosine, "constant": constant}
