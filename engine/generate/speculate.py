"""Speculative decoding: guess some tokens cheaply, then check them all in one pass of the model.

    text so far … x        guesses a b c        one pass over x a b c says what follows each:
                                                a B · ·   so a was right, B replaces b, c is dropped

What a token costs is mostly the reading of all weights, and a pass reads them once for many tokens.
Right guesses are free, wrong ones change nothing: greedy answers are the same to the last id, and
sampled ones have the same distribution. Where guesses cost more than they save, `Pace` stops them.

Sources: Leviathan et al. 2023, arXiv:2211.17192, and Chen et al. 2023, arXiv:2302.01318 (the rule);
Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding (guesses from the text itself).
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.clock import IDLE, Clock
from engine.config import SampleConfig
from engine.errors import CheckpointError
from engine.generate.decoder import Cache, Decoder, Run
from engine.generate.pace import MOST, Pace
from engine.generate.sampler import draw, probabilities, sample
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may come next, and the distribution that each was drawn from.

    Shapes: probabilities fp64 (len(ids), V); None where nothing was drawn: each id was certain.
    """

    ids: Sequence[int] = ()
    probabilities: np.ndarray | None = None


class Guesser(Protocol):
    """Something that guesses what comes next in a text, one text at a time."""

    name: str
    pace: Pace
    draws: bool  # whether guesses are drawn at random, so that the text depends on what is guessed

    def begin(
        self, config: SampleConfig, random: "np.random.Generator", capacity: int, vocab_size: int
    ) -> None:
        """Begin a text of at most `capacity` tokens, chosen by these settings."""
        ...

    def guess(self, tokens: Sequence[int], most: int) -> Guess:
        """Guess up to `most` tokens that follow; `tokens` goes on from those of the last call."""
        ...


class PromptLookup:
    """Guesses that a passage repeats: what followed the last tokens when they came before.

    The longest n-gram decides, and its latest place. An index holds the place after each n-gram, so
    a token costs the same however long the text is.
    """

    draws = False

    def __init__(self, ngram: int = 5, most: int = MOST) -> None:
        self.name, self.pace = "lookup", Pace(most)
        self.sizes = range(ngram, min(2, ngram) - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0  # tokens whose n-grams are in the index

    def begin(
        self, config: SampleConfig, random: "np.random.Generator", capacity: int, vocab_size: int
    ) -> None:
        """Forget the last text; see `Guesser.begin`."""
        self._after.clear()
        self._read = 0

    def guess(self, tokens: Sequence[int], most: int) -> Guess:
        """Copy from where the text was like this before; see `Guesser.guess`."""
        end = len(tokens)
        if end < self._read:  # not the text of the last call
            self._after.clear()
            self._read = 0
        # What the text ends with is not yet in the index: nothing has followed it.
        for place in range(self._read, end):
            for size in self.sizes:
                if size <= place:
                    self._after[tuple(tokens[place - size : place])] = place
        self._read = end
        for size in self.sizes:
            place = self._after.get(tuple(tokens[end - size :])) if size <= end else None
            if place is not None:
                ids = list(tokens[place : place + most])
                while len(ids) < most:  # the passage reaches the end: it repeats itself
                    ids.append(ids[len(ids) - (end - place)])
                return Guess(ids)
        return Guess()


class Draft:
    """Guesses what a cheaper model would say: a smaller one, or the first layers of the same."""

    draws = True

    def __init__(self, decoder: Decoder, most: int = MOST, cost: float = 0.1) -> None:
        """`cost` is that of a guess in steps of the model, for where nothing may be measured."""
        self.name, self.pace = decoder.name, Pace(most, cost)
        self.decoder = decoder
        self._cache: Cache | None = None
        self._held: list[int] = []  # the tokens that the cache holds
        self._same = 0  # of these, how many begin the text for sure

    def begin(
        self, config: SampleConfig, random: "np.random.Generator", capacity: int, vocab_size: int
    ) -> None:
        """Keep the cache: what the texts have in common is not run again. See `Guesser.begin`.

        Raises: CheckpointError if the draft cannot say every token.
        """
        if self.decoder.config.vocab_size < vocab_size:
            raise CheckpointError(
                f"the draft {self.name} knows {self.decoder.config.vocab_size:,} tokens of"
                f" {vocab_size:,}; a draft needs the model's own vocabulary"
            )
        self._config, self._random, self._vocab_size = config, random, vocab_size
        self._same = 0
        capacity = min(capacity, self.decoder.config.max_seq_len)
        if self._cache is None or self._cache.capacity < capacity:
            self._cache, self._held = self.decoder.cache(capacity), []

    def guess(self, tokens: Sequence[int], most: int) -> Guess:
        """Say some tokens; none where the text is too long for the draft. See `Guesser.guess`."""
        assert self._cache is not None, "begin first"
        most = min(most, self._cache.capacity - len(tokens) + 1)
        if most < 1:
            return Guess()
        said, rows = list(tokens), []
        new = said[self._rewind(tokens) :]
        for _ in range(most):
            logits_V = self.decoder.forward(self._cache, [Run(0, new)])[0, : self._vocab_size]
            if self._config.temperature == 0:
                new = [sample(logits_V, said, self._config, self._random)]
            else:
                rows.append(probabilities(logits_V, said, self._config))
                new = [draw(rows[-1], self._random)]
            said += new
        self._held, self._same = said[:-1], len(tokens)
        return Guess(said[len(tokens) :], np.stack(rows) if rows else None)

    def _rewind(self, tokens: Sequence[int]) -> int:
        """Cut the cache back to what begins the text, all but its last token at most."""
        assert self._cache is not None
        same, most = self._same, min(len(self._held), len(tokens) - 1)
        while same < most and self._held[same] == tokens[same]:
            same += 1
        same = min(same, most)
        cut_back(self.decoder, self._cache, 0, tokens[:same])
        return same


def accept(
    guess: int, guessed_V: np.ndarray, wanted_V: np.ndarray, random: "np.random.Generator"
) -> int:
    """Return a guess that was drawn from `guessed_V`, or what replaces it.

    Kept with probability p/q, or else drawn from the residual max(0, p - q): either way what comes
    out is distributed as `wanted_V`. Shapes: guessed_V q, wanted_V p: fp64 (V,), adding up to 1.
    """
    if random.random() * guessed_V[guess] < wanted_V[guess]:
        return guess
    rest_V = np.maximum(wanted_V - guessed_V, 0)
    # All of it can be lost to rounding, where p and q are the same.
    return draw(rest_V if rest_V.any() else wanted_V, random)


def check(
    guess: Guess,
    logits_TV: np.ndarray,
    tokens: Sequence[int],
    config: SampleConfig,
    random: "np.random.Generator",
) -> list[int]:
    """Return the guesses that are right and the token after them: one at least.

    Shapes: logits_TV fp32 (len(guess.ids) + 1, V), of what follows `tokens` and each guess.
    """
    said = list(tokens)
    for place, logits_V in enumerate(logits_TV):
        asked = place < len(guess.ids)
        if asked and guess.probabilities is not None:
            wanted_V = probabilities(logits_V, said, config)
            guessed_V = guess.probabilities[place]
            said.append(accept(guess.ids[place], guessed_V, wanted_V, random))
        else:
            # A certain guess has q = 1, so one draw from p decides it all: it is the guess with
            # probability p, or else of the residual. It is also the draw of plain decoding.
            said.append(sample(logits_V, said, config, random))
        if not asked or said[-1] != guess.ids[place]:
            break
    return said[len(tokens) :]


def speculate(
    decoder: Decoder,
    cache: Cache,
    row: int,
    prompt: Sequence[int],
    logits_V: np.ndarray,
    config: SampleConfig,
    random: "np.random.Generator",
    guesser: Guesser,
    clock: Clock = IDLE,
) -> Generator[tuple[int, np.ndarray]]:
    """Yield each token that is chosen after a prompt, with the logits that it was chosen by.

    `logits_V` are those after the prompt, which the row holds. When it is closed the row holds all
    tokens but the last one yielded.
    """
    pace, V = guesser.pace, len(logits_V)
    guesser.begin(config, random, cache.capacity, V)
    pace.begin(timed=config.temperature == 0 or not guesser.draws)
    tokens = [*prompt, sample(logits_V, prompt, config, random)]
    end = len(prompt) + config.max_tokens
    clock.lap("sample")
    try:
        yield tokens[-1], logits_V
        while True:
            began = time.perf_counter()
            if not cut_back(decoder, cache, row, tokens[:-1]):
                pace.stop("the cache cannot go back: a sliding window let go of what it needs")
            most = pace.length(min(end - 1, cache.capacity) - len(tokens))
            guess = guesser.guess(tokens, most) if most else Guess()
            clock.lap("guess")
            run = Run(row, [tokens[-1], *guess.ids], wanted=len(guess.ids) + 1)
            logits_TV = decoder.forward(cache, [run])[:, :V]
            clock.lap("decode")
            chosen = check(guess, logits_TV, tokens, config, random)
            pace.note(len(guess.ids), len(chosen) - 1, time.perf_counter() - began)
            clock.lap("sample")
            for token_id, logits_V in zip(chosen, logits_TV, strict=False):
                tokens.append(token_id)
                yield token_id, logits_V
    finally:
        if cache.lengths[row] >= len(tokens):
            cut_back(decoder, cache, row, tokens[:-1])


def cut_back(decoder: Decoder, cache: Cache, row: int, tokens: Sequence[int]) -> bool:
    """Make a row hold just the first `tokens`; False if they had to be run again for it."""
    if cache.lengths[row] == len(tokens):
        return True
    try:
        cache.rewind(row, len(tokens))
        return True
    except ValueError:
        cache.rewind(row, 0)
        if tokens:
            decoder.forward(cache, [Run(row, tokens, wanted=0)])
        return False


def check_vocabulary(ours: Tokenizer, theirs: Tokenizer, name: str) -> None:
    """Refuse a draft that does not call the same tokens by the same ids. Raises: CheckpointError"""
    if ours.pieces != theirs.pieces:
        raise CheckpointError(
            f"--draft {name}: its vocabulary is not that of the model ({theirs.vocab_size:,} tokens"
            f" beside {ours.vocab_size:,}); take a draft with the same tokenizer, or lookup"
        )
