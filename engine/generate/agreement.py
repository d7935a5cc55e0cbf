"""Is the text the same however it is computed? One prompt, continued in every way there is.

    uncached     each token by a fresh cache that reads everything before it
    cached       the prompt at once, then one token at a time
    chunked      the prompt in pieces of odd sizes
    batched      among two other rows, one shorter and one that began later
    streamed     by the stream that `lm generate` writes
    lookup       the same, with tokens guessed by looking back in the text
    corrected    the same, with guesses of which every third is wrong
    restored     each token by a fresh cache that is given the blocks another one saved

The likeliest token is taken each time, so only the arithmetic can make a difference. All ways are
held against the first, in which nothing is reused and so nothing can be stale.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from engine.config import SampleConfig
from engine.generate.decode import generate, prefill
from engine.generate.decoder import BLOCK, Cache, Decoder, Run
from engine.generate.pace import Pace
from engine.generate.speculate import Guess, Guesser, PromptLookup
from engine.text.tokenizer import Tokenizer

PIECES = (1, 3, 7, 13, 31, 61, 127)  # tokens of a prompt that are read at once, over and over
GUESSES, WRONG = 4, 3  # tokens guessed at once where some are there to be corrected: one in three

Logits = Mapping[int, np.ndarray]  # by position: what comes after it


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of continuing, held against the first."""

    name: str
    ids: list[int] = field(default_factory=list)
    same: bool | None = None  # None if it could not be tried
    first_difference: int | None = None  # which new token is another, counted from 0
    largest: float = 0.0  # difference between logits, as long as both had read the same
    exact: bool = False  # those logits are equal to the bit
    note: str = ""  # why it could not be tried


def agree(
    decoder: Decoder, tokenizer: Tokenizer, prompt: Sequence[int], most: int
) -> Iterator[Way]:
    """Continue a prompt by `most` tokens or up to an end, and yield each way as it is done."""
    known: list[int] = []
    expected: Logits = {}
    for name, way in WAYS.items():
        watched = Watched(decoder)
        task = Task(watched, tokenizer, list(prompt), most, known)
        ids = way(task)
        if isinstance(ids, str):
            yield Way(name=name, note=ids)
            continue
        if not expected:
            known, expected = ids, watched.logits
        first = _first_difference(ids, known)
        # The first new token was chosen by the logits after the last of the prompt.
        start, read = len(prompt) - 1, len(known) if first is None else first + 1
        places = expected.keys() & watched.logits.keys() & set(range(start, start + read))
        pairs = [(watched.logits[place], expected[place]) for place in places]
        yield Way(
            name=name,
            ids=ids,
            same=first is None,
            first_difference=first,
            largest=max((float(np.abs(a - b).max()) for a, b in pairs), default=0.0),
            exact=all(np.array_equal(a, b) for a, b in pairs),
        )


def long_enough(prompt: Sequence[int], room: int) -> list[int]:
    """Return a prompt, repeated if it is too short for a block to be restored and there is room."""
    wanted = BLOCK + 1
    if len(prompt) >= wanted or room < wanted:
        return list(prompt)
    return (list(prompt) * wanted)[:wanted]


def distance(one: Decoder, other: Decoder, tokens: Sequence[int], most: int) -> float:
    """Return how far apart the last `most` logits of two decoders are, as share of the largest."""
    run = Run(0, tokens, wanted=most)
    ours, theirs = (each.forward(each.cache(len(tokens)), [run]) for each in (one, other))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _first_difference(ids: list[int], known: list[int]) -> int | None:
    """Return the first place at which two lists are not the same; one may end before the other."""
    longest = max(len(ids), len(known))
    return next((i for i in range(longest) if ids[i : i + 1] != known[i : i + 1]), None)


class Watched:
    """A decoder that keeps the logits of its row 0."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config, self.name, self.identity = decoder.config, decoder.name, decoder.identity
        self.logits: dict[int, np.ndarray] = {}

    def cache(self, capacity: int, rows: int = 1) -> Cache:
        """Return an empty cache of the decoder."""
        return self.decoder.cache(capacity, rows)

    def forward(self, cache: Cache, runs: Sequence[Run]) -> np.ndarray:
        """Run tokens through the decoder; a position that is run again counts as it came last."""
        logits = self.decoder.forward(cache, runs)
        rows = iter(logits)
        for run in runs:
            end = cache.lengths[run.row]
            found = {place: next(rows).copy() for place in range(end - run.wanted, end)}
            if run.row == 0:
                self.logits |= found
        return logits


@dataclass(frozen=True, slots=True)
class Task:
    """What every way does: continue a prompt by the likeliest tokens."""

    decoder: Decoder
    tokenizer: Tokenizer
    prompt: list[int]
    most: int
    known: list[int]  # what the first way found

    def cache(self, rows: int = 1) -> Cache:
        """Return an empty cache with room for everything."""
        return self.decoder.cache(len(self.prompt) + self.most, rows)

    def greedily(self, after: Callable[[list[int]], np.ndarray]) -> list[int]:
        """Continue with nothing of `generate`; `after` gives the logits after these tokens."""
        ids: list[int] = []
        while len(ids) < self.most and not self.tokenizer.ends.intersection(ids[-1:]):
            logits_V = after(self.prompt + ids)[-1]
            ids.append(int(logits_V[: self.tokenizer.vocab_size].argmax()))
        return ids

    def stream(self, guesser: Guesser | None = None) -> list[int]:
        """Continue as the command does."""
        start = prefill(self.decoder, self.prompt, self.cache())
        settings = SampleConfig(temperature=0, max_tokens=self.most)
        tokens = generate(self.decoder, self.tokenizer, start, settings, seed=0, guesser=guesser)
        return [token.id for token in tokens]


def _uncached(task: Task) -> list[int]:
    return task.greedily(lambda ids: task.decoder.forward(task.cache(), [Run(0, ids)]))


def _cached(task: Task) -> list[int]:
    cache = task.cache()
    return task.greedily(lambda ids: task.decoder.forward(cache, [Run(0, ids[cache.lengths[0] :])]))


def _chunked(task: Task) -> list[int]:
    cache, sizes = task.cache(), cycle(PIECES)

    def after(ids: list[int]) -> np.ndarray:
        """Return the logits after these tokens."""
        while True:
            begun = cache.lengths[0]
            logits = task.decoder.forward(cache, [Run(0, ids[begun : begun + next(sizes)])])
            if cache.lengths[0] == len(ids):
                return logits

    return task.greedily(after)


def _batched(task: Task) -> list[int]:
    cache, T = task.cache(rows=3), len(task.prompt)

    def after(ids: list[int]) -> np.ndarray:
        """Return the logits after these tokens."""
        new, begun = ids[cache.lengths[0] :], cache.lengths[0] > 0
        short, late = (new, new) if begun else (ids[: T - T // 2], ids[T // 3 :])
        return task.decoder.forward(cache, [Run(1, short), Run(0, new), Run(2, late)])[1:2]

    return task.greedily(after)


def _restored(task: Task) -> list[int] | str:
    blocks: list[np.ndarray] = []
    loaded = 0

    def after(ids: list[int]) -> np.ndarray:
        """Return the logits after these tokens."""
        nonlocal loaded
        cache, loaded = task.cache(), len(blocks)
        for block in blocks:
            cache.load_block(0, block)
        logits = task.decoder.forward(cache, [Run(0, ids[loaded * BLOCK :])])
        blocks.extend(cache.save_block(0, i) for i in range(loaded, len(ids) // BLOCK))
        return logits

    try:
        ids = task.greedily(after)
    except ValueError as error:  # a sliding window keeps no blocks
        return str(error)
    return ids if loaded else f"needs more than {BLOCK} tokens"


class _Steady(Pace):
    """Guesses some tokens in each pass, whether it pays or not."""

    def length(self, room: int) -> int:
        """Return how many tokens to guess now; see `Pace.length`."""
        return min(GUESSES, room)


class _Corrected(PromptLookup):
    """Guesses what the first way found, but every third token wrong."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.pace: Pace = _Steady()
        self.name, self.task = "corrected", task

    def guess(self, tokens: Sequence[int], most: int) -> Guess:
        """Say what comes after these tokens, as far as it is known; see `Guesser.guess`."""
        made, size = len(tokens) - len(self.task.prompt), self.task.tokenizer.vocab_size
        known = list(enumerate(self.task.known))[made : made + most]
        return Guess([(token + (place % WRONG == 0)) % size for place, token in known])


WAYS: dict[str, Callable[[Task], list[int] | str]] = {
    "uncached": _uncached,
    "cached": _cached,
    "chunked": _chunked,
    "batched": _batched,
    "streamed": Task.stream,
    "lookup": lambda task: task.stream(PromptLookup()),
    "corrected": lambda task: task.stream(_Corrected(task)),
    "restored": _restored,
}
