"""Where the time goes: wall time cut into stages, with no gap between them.

    clock.lap("prefill")   what has passed since the last lap was prefill
    clock.lap("sample")    and from there to here was sampling

Every moment belongs to one stage, so the stages add up to the whole. The clock is an argument of
the functions it watches; what nobody watches gets `IDLE`, which costs a call and does nothing.
"""

import time
from collections.abc import Callable


class Clock:
    """Adds up the seconds of each stage since `start`."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        """Begin; `wait` returns when all queued work is done, where a device has a queue."""
        self.wait = wait
        self.start()

    def start(self) -> None:
        """Forget everything and begin now."""
        self.seconds: dict[str, float] = {}
        self.latest = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the lap before, or the start, to `stage`."""
        if self.wait:  # what a stage has queued is its work, not the next one's
            self.wait()
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.latest
        self.latest = now


class Unwatched(Clock):
    """A clock that measures nothing."""

    def lap(self, stage: str) -> None:
        """Do nothing."""


IDLE = Unwatched()
