"""What was measured of a case: each repetition, and all of them summed up.

Knows nothing of torch: comparing two records has to start at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from engine.bench import stats
from engine.bench.cases import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the machine can do at most with so many threads."""

    threads: int
    bandwidth: float  # bytes/s
    peaks: dict[str, float]  # FLOP/s of matrix products, by precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case turned out to be one that was measured before."""

    case: Case
    wish: str  # for a precision or for kernels, which were those of the case


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """One measurement. Times are in seconds since it began."""

    case: Case
    number: int  # from 1
    at: str  # when it began, ISO 8601 in UTC
    seconds: float  # from beginning to end, by a clock of its own
    stages: dict[str, float]  # these add up to it
    times: list[float]  # when each token was there, or the step
    rate: float  # tokens/s; bytes/s for `load`
    peak_memory: int
    flops: float | None  # per token
    bytes: float | None  # per token
    bandwidth: float  # limits of the machine, measured in the same call
    peak_flops: float | None


class Result:
    """The repetitions of one case, summed up."""

    def __init__(self, repetitions: Sequence[Repetition]) -> None:
        self.repetitions = repetitions
        self.case, self.last = repetitions[-1].case, repetitions[-1]
        self.rates = [repetition.rate for repetition in repetitions]
        self.rate = median(self.rates)
        self.spread = stats.spread(self.rates)
        self.noisy = self.spread > stats.NOISY
        self.peak_memory = max(repetition.peak_memory for repetition in repetitions)

    @cached_property
    def gaps(self) -> list[float]:
        """Seconds between two tokens, of all repetitions."""
        return [
            later - earlier
            for repetition in self.repetitions
            for earlier, later in zip(repetition.times, repetition.times[1:], strict=False)
        ]

    @property
    def first(self) -> float | None:
        """Seconds from a prompt's text to the first token of the answer, the median."""
        if self.case.what != "prefill":
            return None
        return median(repetition.times[0] for repetition in self.repetitions)

    def gap(self, share: float) -> float | None:
        """Return the time that so much of all gaps between tokens stay below."""
        return stats.quantile(self.gaps, share) if self.gaps else None

    @property
    def of_bandwidth(self) -> float | None:
        """Share of the measured memory bandwidth that this work used."""
        return (
            None if self.last.bytes is None else self.rate * self.last.bytes / self.last.bandwidth
        )

    @property
    def of_peak(self) -> float | None:
        """Share of the measured matmul peak of its precision."""
        if self.last.flops is None or not self.last.peak_flops:
            return None
        return self.rate * self.last.flops / self.last.peak_flops

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage in a repetition, the mean: only means add up."""
        count = len(self.repetitions)
        names = dict.fromkeys(name for each in self.repetitions for name in each.stages)
        return {
            name: sum(each.stages.get(name, 0.0) for each in self.repetitions) / count
            for name in names
        }
