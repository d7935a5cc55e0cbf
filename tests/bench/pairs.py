"""Two sides of a comparison, timed in turn, and what may be said of them afterwards.

A machine changes its speed while it is measured, so each round times every side once, and every
other round in reverse order: what slows one side down slows the other too. The figure is the ratio
of the medians; how sure it is, a bootstrap over rounds says. Source: Efron 1979 (the bootstrap).
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEAST = 3  # rounds, however slow they are
RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How often to measure: at most so many rounds, and none begun after so many seconds."""

    most: int = 9
    seconds: float = 90.0
    warm_up: int = 2  # untimed rounds: first touch of memory, compiling


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float


def alternate(sides: Mapping[str, Callable[[], object]], rounds: Rounds) -> dict[str, list[float]]:
    """Return the seconds of each side, by round."""
    for _ in range(rounds.warm_up):
        for side in sides.values():
            side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for number in range(rounds.most):
        if number >= LEAST and time.perf_counter() - began > rounds.seconds:
            break
        for name in list(sides)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return how many times less ours is than theirs; both are of the same rounds."""
    pairs, draw = list(zip(ours, theirs, strict=True)), random.Random(0)

    def of(chosen: Sequence[tuple[float, float]]) -> float:
        a, b = zip(*chosen, strict=True)
        return statistics.median(b) / statistics.median(a)

    drawn = sorted(of(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    edge = RESAMPLES // 40
    return Ratio(value=of(pairs), low=drawn[edge], high=drawn[-edge - 1])


def spread(times: Sequence[float]) -> float:
    """Return the interquartile range over the median: 0 where all are the same."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle
