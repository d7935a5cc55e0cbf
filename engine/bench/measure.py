"""Measuring cases: warm up, repeat, and yield every repetition with all that was seen of it.

    for event in measure(subject, cases, repeats=5):    Limits, then Repetition after Repetition

Beside each speed stand the limits of the machine, measured in the same call with the same threads.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial

from engine.bench.cases import Case
from engine.bench.result import Limits, Measured, Repetition
from engine.bench.subject import Loaded, Subject
from engine.bench.work import WORKS, Work, loading, training
from engine.clock import Clock
from engine.hardware import synchronize, use_threads
from engine.machine import matmul_peaks, memory_bandwidth
from engine.peak import forget_peak_memory, peak_memory
from engine.recipe import override
from engine.train.precision import first_build
from engine.train.prepare import Doing

TASTE = 0.3  # seconds for each limit
# What our own C multiplies numbers of a format as.
PRODUCTS = {"bf16": "fp32", "fp16": "fp32", "int4": "int8"}


def measure(
    subject: Subject, cases: Sequence[Case], *, warm_up: int = 1, repeats: int = 5
) -> Iterator[Doing | Limits | Measured | Repetition]:
    """Measure cases in turn; limits come before the first of as many threads.

    A case that turns out to be the same as one before, `auto` beside what it takes, is left out.

    Raises: ResourceError if memory does not suffice, and what the works raise.
    """
    limits: dict[int, Limits] = {}
    done: set[Case] = set()
    model: tuple[tuple, Loaded] | None = None  # how it was wished for, and what is loaded
    for case in cases:
        use_threads(case.threads)
        if case.threads not in limits:
            limits[case.threads] = Limits(
                threads=case.threads,
                bandwidth=memory_bandwidth(case.threads, TASTE),
                peaks=matmul_peaks(subject.device, TASTE),
            )
            yield limits[case.threads]
        if what := _building(case, subject):
            yield Doing(what=what)
        if case.what in WORKS and (model is None or model[0] != case.how):
            model = None  # let go of the old one before the new one comes
            model = (case.how, subject.loaded(case))
        elif case.what not in WORKS:
            model = None
        with ExitStack() as stack:
            clock = Clock(partial(synchronize, subject.device))
            work = _prepare(case, subject, model, clock, stack)
            wishes = [wish for wish in (case.kernels, case.dtype, case.kv) if wish != "auto"]
            case = replace(case, dtype=work.dtype, kernels=work.kernels, kv=work.kv)
            if case in done:
                yield Measured(case=case, wish=" ".join(filter(None, wishes)))
                continue
            done.add(case)
            for _ in range(warm_up):
                work.do()
            for number in range(1, repeats + 1):
                yield _repetition(case, number, work, clock, limits[case.threads])


def _building(case: Case, subject: Subject) -> str:
    """Say that kernels will be built first, if they will."""
    if case.what != "train" or not subject.recipe:
        return subject.building(case)
    wish = override(subject.recipe, run={"dtype": case.dtype}).run
    return first_build(wish, subject.device, subject.cache)


def _prepare(
    case: Case, subject: Subject, model: tuple[tuple, Loaded] | None, clock: Clock, stack: ExitStack
) -> Work:
    """Make everything ready for a case."""
    if case.what == "train":
        return stack.enter_context(training(case, subject, clock))
    if model is None:
        return loading(case, subject, clock)
    return WORKS[case.what](case, subject, model[1], clock)


def _repetition(case: Case, number: int, work: Work, clock: Clock, limits: Limits) -> Repetition:
    """Measure once."""
    native = case.kernels == "native"
    product = PRODUCTS.get(case.dtype, case.dtype) if native else case.dtype
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
        peak_flops=limits.peaks.get(product),
    )
