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
HOPELESS = 8  # a side this many times slower than the fastest is timed once
PATIENCE = 10.0  # seconds: a first try that took longer is that one time
RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How often to measure: at most so many rounds, and none begun after so many seconds."""

    most: int = 9
    seconds: float = 90.0
    warm_up: int = 2  # untimed rounds: first touch of memory, compiling


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio of medians with its 95 % interval; None where a side was timed once."""

    value: float
    low: float | None = None
    high: float | None = None


def alternate(sides: Mapping[str, Callable[[], object]], rounds: Rounds) -> dict[str, list[float]]:
    """Return the seconds of each side, by round.

    A side that is far behind after the warm-up is not worth minutes of everyone's time (bf16 where
    the processor has none takes many times as long): its last warm-up is its only time, and its
    first if that took long.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    going = list(sides)
    for left in reversed(range(rounds.warm_up)):
        warm = {name: seconds(sides[name]) for name in going}
        limit = max(HOPELESS * min(warm.values()), PATIENCE if left else 0.0)
        times |= {name: [taken] for name, taken in warm.items() if taken > limit}
        going = [name for name in going if not times[name]]
    began = time.perf_counter()
    for number in range(rounds.most):
        if number >= LEAST and time.perf_counter() - began > rounds.seconds:
            break
        for name in going[:: -1 if number % 2 else 1]:
            times[name].append(seconds(sides[name]))
    return times


def seconds(work: Callable[[], object]) -> float:
    """Return how long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return how many times less ours is than theirs; both are of the same rounds."""
    if min(len(ours), len(theirs)) < 2:
        return Ratio(value=statistics.median(theirs) / statistics.median(ours))
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
