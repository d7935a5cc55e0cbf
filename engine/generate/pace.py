"""How far to guess ahead, and whether guessing pays at all: decided from what was seen lately.

If each guess is right with probability α, k of them are worth (1 - α^(k+1)) / (1 - α) tokens a
pass; and the pass takes 1 + c·k plain steps, where c is the time to make and to check one guess.
`Pace` measures both and picks the k that wins most. Where none wins it guesses nothing for a while,
tries again later, and gives up if that goes on.

Source: Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8.
"""

from collections import deque
from dataclasses import dataclass

MOST = 16  # guesses a pass, where nobody said otherwise
MEMORY = 12.0  # all that was seen before weighs as much as so many guesses
HOPE = (4.0, 5.0)  # right guesses of all, before any was seen
STEPS = 3  # plain steps at first, to know what they take
TRIES = 3  # passes with guesses before it is decided whether they pay
EVERY = 64  # passes until a plain step is measured again
PAUSES = (32, 128)  # plain steps until the next try, by losses in a row; one more ends it


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculated:
    """How guessing went in one answer, its first token left out: that came with the prompt."""

    guesser: str
    tokens: int
    forwards: int  # passes of the model
    guessing: int  # those that checked guesses
    guessed: int
    accepted: int
    expected: float | None  # times as fast as without, by what a step and a guess usually take
    real: float | None  # the same from all seconds, and those of plain steps; None without one
    off: str  # why guessing was switched off, for good or for a while; empty if it never was

    @property
    def accepted_per_forward(self) -> float:
        """Guesses that a pass found right, of those that checked any."""
        return self.accepted / self.guessing if self.guessing else 0.0


def speed_up(right: float, count: int, cost: float) -> float:
    """Return how many times as fast it is to guess `count` tokens each time.

    `right` is the probability that a guess is right if those before it are, `cost` the time of one
    in plain steps.
    """
    tokens = sum(right**place for place in range(count + 1))
    return tokens / (1 + count * cost)


def _usual(seconds: deque[float]) -> float:
    """Return the lower quartile: what else the machine does only makes things take longer."""
    return sorted(seconds)[len(seconds) // 4]


class Pace:
    """Chooses how many tokens to guess next."""

    def __init__(self, most: int = MOST, cost: float = 0.1) -> None:
        """At most `most` at once; one costs `cost` plain steps as long as nothing was measured."""
        self.most, self.cost = most, cost
        self._steps: deque[float] = deque(maxlen=15)  # seconds of plain steps
        self._costs: deque[float] = deque(maxlen=15)  # of a guess, in plain steps
        self.begin()

    def begin(self, timed: bool = True) -> None:
        """Begin an answer. Without `timed` nothing is decided by the clock, so that it repeats."""
        self._timed = timed
        self._right, self._seen = HOPE
        self._first, self._tries, self._pause = STEPS, TRIES, 0
        self._since = 0  # passes since the last plain step
        self._losing, self._stopped = "", ""
        self._losses = self._in_a_row = 0
        self._forwards = self._guessing = self._guessed = self._accepted = 0
        self._seconds = self._plain = 0.0  # of all passes, and of those without guesses

    def stop(self, why: str) -> None:
        """Guess no more in this answer."""
        self._stopped = why

    def length(self, room: int) -> int:
        """Return how many tokens to guess now, of which there is room for so many."""
        if room < 1 or self._stopped:
            return 0
        if self._first or self._pause or self._since >= EVERY:
            return 0
        best = self._best()
        if not self._tries:
            if not best:
                self._lose()
                return 0
            self._in_a_row = 0
        return min(best or 1, room)

    def note(self, guessed: int, accepted: int, seconds: float) -> None:
        """Learn from a pass that checked so many guesses and found so many right."""
        self._forwards += 1
        self._seconds += seconds
        if not guessed:
            self._plain += seconds
            self._steps.append(seconds)
            self._first, self._pause = max(0, self._first - 1), max(0, self._pause - 1)
            self._since = 0
            return
        self._since += 1
        self._tries = max(0, self._tries - 1)
        self._guessing += 1
        self._guessed += guessed
        self._accepted += accepted
        older = min(1.0, MEMORY / self._seen)
        self._right = older * self._right + accepted
        self._seen = older * self._seen + min(accepted + 1, guessed)
        if self._steps and self._guessing > 1:  # the first time, a draft reads the whole prompt
            step = _usual(self._steps)
            self._costs.append(max(0.0, seconds - step) / (step * guessed))

    def report(self, guesser: str) -> Speculated:
        """Return how it went since `begin`."""
        tokens = self._forwards + self._accepted
        expected = real = None
        if self._steps and self._forwards:
            cost = _usual(self._costs) if self._costs else 0.0
            expected = tokens / (self._forwards + cost * self._guessed)
            plain = self._forwards - self._guessing
            real = tokens * self._plain / plain / self._seconds if plain else None
        return Speculated(
            guesser=guesser,
            tokens=tokens,
            forwards=self._forwards,
            guessing=self._guessing,
            guessed=self._guessed,
            accepted=self._accepted,
            expected=expected,
            real=real,
            off=self._stopped or self._losing,
        )

    def _best(self) -> int:
        """Return the count that wins most; 0 if none is better than no guess."""
        right, cost = min(self._right / self._seen, 0.99), self._cost()
        return max(range(self.most + 1), key=lambda count: speed_up(right, count, cost))

    def _cost(self) -> float:
        return _usual(self._costs) if self._timed and self._costs else self.cost

    def _lose(self) -> None:
        """Pause, each time for longer, then give guessing another try; at last give it up."""
        right, cost = self._right / self._seen, self._cost()
        why = f"lately some {right:.0%} right, and one takes {cost:.2f} of a token's time"
        if self._in_a_row == len(PAUSES):
            self.stop(f"given up: {why}")
            return
        self._losses += 1
        times = "once" if self._losses == 1 else f"{self._losses} times"
        self._losing = f"paused {times}: {why}"
        self._pause = PAUSES[self._in_a_row]
        self._in_a_row += 1
        self._right, self._seen = HOPE
        self._tries = TRIES
