"""Measuring cases: warm up, repeat, and yield every repetition with all that was seen of it.

    for event in measure(subject, cases, repeats=5):    Limits, then Repetition after Repetition

Beside each speed stand the limits of the machine, measured in the same call with the same threads.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from statistics import median

from engine.bench import stats
from engine.bench.cases import Case
from engine.bench.subject import Subject
from engine.bench.work import WORKS, Model, Work, loading, training
from engine.clock import Clock
from engine.hardware import forget_peak_memory, peak_memory, use_threads
from engine.machine import matmul_peaks, memory_bandwidth

TASTE = 0.3  # seconds for each limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the machine can do at most with so many threads."""

    threads: int
    bandwidth: float  # bytes/s
    peaks: dict[str, float]  # FLOP/s of matrix products, by precision


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


def measure(
    subject: Subject, cases: Sequence[Case], *, warm_up: int = 1, repeats: int = 5
) -> Iterator[Limits | Repetition]:
    """Measure cases in turn; limits come before the first of as many threads.

    Raises: ResourceError if memory does not suffice, and what the works raise.
    """
    limits: dict[int, Limits] = {}
    model: tuple[str, Model] | None = None  # the precision wished for, and what is loaded of it
    for case in cases:
        use_threads(case.threads)
        if case.threads not in limits:
            limits[case.threads] = Limits(
                threads=case.threads,
                bandwidth=memory_bandwidth(case.threads, TASTE),
                peaks=matmul_peaks(subject.device, TASTE),
            )
            yield limits[case.threads]
        if case.what in WORKS and (model is None or model[0] != case.dtype):
            model = None  # let go of the old one before the new one comes
            model = (case.dtype, subject.loaded(case.dtype))
        elif case.what not in WORKS:
            model = None
        with ExitStack() as stack:
            clock = Clock(subject.device)
            work = _prepare(case, subject, model, clock, stack)
            for _ in range(warm_up):
                work.do()
            case = replace(case, dtype=work.dtype)
            for number in range(1, repeats + 1):
                yield _repetition(case, number, work, clock, limits[case.threads])


def _prepare(
    case: Case, subject: Subject, model: tuple[str, Model] | None, clock: Clock, stack: ExitStack
) -> Work:
    """Make everything ready for a case."""
    if case.what == "train":
        return stack.enter_context(training(case, subject, clock))
    if model is None:
        return loading(case, subject, clock)
    return WORKS[case.what](case, subject, model[1], clock)


def _repetition(case: Case, number: int, work: Work, clock: Clock, limits: Limits) -> Repetition:
    """Measure once."""
    forget_peak_memory()
    at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    clock.start()
    began = time.perf_counter()
    taken = work.do()
    seconds = time.perf_counter() - began
    return Repetition(
        case=case,
        number=number,
        at=at,
        seconds=seconds,
        stages=dict(clock.seconds),
        times=[moment - began for moment in taken.times],
        rate=taken.tokens / taken.seconds,
        peak_memory=peak_memory(),
        flops=work.flops,
        bytes=work.bytes,
        bandwidth=limits.bandwidth,
        peak_flops=limits.peaks.get(case.dtype),
    )
