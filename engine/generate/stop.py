"""Stop strings over a stream of text: never shown, never missed, nothing else held back.

A stop string may begin in one token and end in another. Text that could be the beginning of one is
kept until it turns out to be, or not to be.
"""

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until the first occurrence of any stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Take more text and return what may be shown; nothing after a stop string was found."""
        if self.hit is not None:
            return ""
        self.held += text
        # The match that is complete first wins, so that the cuts between tokens change nothing.
        starts = [(self.held.find(stop), stop) for stop in self.stops]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if found:
            _, start, self.hit = min(found)
            shown, self.held = self.held[:start], ""
            return shown
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def flush(self) -> str:
        """Return the text still held back: the stream ended, so it was no stop string."""
        shown, self.held = self.held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Return the length of the longest end of the held text that begins `stop`."""
        for size in range(min(len(stop) - 1, len(self.held)), 0, -1):
            if self.held.endswith(stop[:size]):
                return size
        return 0
