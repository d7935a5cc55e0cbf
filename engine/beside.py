"""A call that goes on in a thread of its own, while this one does something else.

What `concurrent.futures` would do takes longer to import than is won by it.
"""

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
BEGINNING = 0.002  # seconds that the call is given to get to where it needs no lock


class Beside(Generic[T]):
    """A call in a thread; it ends with the process if nobody waits for it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()
        self._thread.join(BEGINNING)  # else this thread may keep Python's lock for long

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            self._error = error

    def result(self) -> T:
        """Wait for the call, and return what it returned or raise what it raised."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._result
