"""Generating: read the prompt once (prefill), then one token at a time (decode), over a cache.

    start = prefill(decoder, prompt, decoder.cache(capacity))
    for token in generate(decoder, tokenizer, start, settings, seed=1): …

`generate` yields a `Token` per step with the text it makes ready to show. Streaming, JSON output,
samples during training and benchmarks all consume this one stream. Needs no torch.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.clock import IDLE, Clock
from engine.config import SampleConfig
from engine.errors import DataError, LimitError
from engine.generate.decoder import Cache, Decoder, Run
from engine.generate.sampler import sample, seeded, top_k
from engine.generate.writer import Token, Writer
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.generate.speculate import Guesser


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """A prompt that has been read: its ids, the row that holds it, the logits of what follows."""

    prompt: list[int]
    cache: Cache
    row: int
    logits_V: np.ndarray

    def copied(self, row: int) -> "Prefilled":
        """Copy the prompt into another row: one prefill, many continuations."""
        self.cache.copy(self.row, row)
        return replace(self, row=row)


def counted(tokens: int) -> str:
    """Return how many tokens there are, in words."""
    return f"{tokens:,} token" + ("" if tokens == 1 else "s")


def fit_prompt(prompt: list[int], max_tokens: int, context: int, on_overflow: str) -> list[int]:
    """Return the prompt, cut only if the caller chose how.

    `on_overflow` is `error`, `left` (drop the beginning), `middle` or `right` (drop the end).

    Raises: LimitError if prompt and answer do not fit the context and `error` was chosen, or if the
    answer alone fills it.
    """
    room = context - max_tokens
    if len(prompt) <= room:
        return prompt
    if on_overflow == "error":
        raise LimitError(
            f"prompt of {counted(len(prompt))} + --max-tokens {max_tokens:,} > context"
            f" {context:,}; shorten one, or choose --on-overflow left|middle|right"
        )
    if room < 1:
        raise LimitError(
            f"--max-tokens {max_tokens:,} leaves no room for a prompt in a context of {context:,}"
        )
    if on_overflow == "left":
        return prompt[-room:]
    if on_overflow == "right":
        return prompt[:room]
    head = room // 2
    return prompt[:head] + prompt[len(prompt) - (room - head) :]


def prefill(
    decoder: Decoder, prompt: list[int], cache: Cache, row: int = 0, *, clock: Clock = IDLE
) -> Prefilled:
    """Run the prompt through the model into a row of the cache.

    What the row holds already begins the prompt, as in a conversation: only the rest is run.

    Raises: DataError if the prompt is empty; ValueError if the row holds all of it or more.
    """
    if not prompt:
        raise DataError("the prompt is empty: there is nothing to continue")
    held = cache.lengths[row]
    if held >= len(prompt):
        raise ValueError(f"the cache holds {held} of {len(prompt)} prompt tokens already")
    (logits_V,) = decoder.forward(cache, [Run(row, prompt[held:])])
    clock.lap("prefill")
    return Prefilled(prompt=prompt, cache=cache, row=row, logits_V=logits_V)


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    start: Prefilled,
    config: SampleConfig,
    *,
    seed: int,
    stops: Sequence[str] = (),
    logprobs: int | None = None,
    guesser: "Guesser | None" = None,
    clock: Clock = IDLE,
) -> Generator[Token]:
    """Continue a prompt until an end token, a stop string or `config.max_tokens`.

    The row goes on where the prompt ends, and at last holds all tokens but the newest; to continue
    a prompt more than once, give each a row of its own by `Prefilled.copied`. With `logprobs` k,
    each token comes with its log-probability and the k likeliest alternatives. A `guesser` makes
    it faster where it guesses well, and never changes what is likely.
    """
    writer = Writer(tokenizer, stops, config.max_tokens, tokenizer.ends)
    # What a model has beyond the tokenizer's tokens has no text.
    start = replace(start, logits_V=start.logits_V[: tokenizer.vocab_size])
    if guesser is None:
        random = seeded(seed) if config.temperature else None
        choices = _one_by_one(decoder, start, config, random, clock)
    else:
        from engine.generate.speculate import speculate

        where = decoder, start.cache, start.row, start.prompt, start.logits_V
        choices = speculate(*where, config, seeded(seed), guesser, clock)
    clock.lap("decode")
    with closing(choices):
        while writer.left:
            token_id, logits_V = next(choices)
            now = time.perf_counter()
            known = {} if logprobs is None else scores(logits_V, token_id, logprobs)
            clock.lap("sample")
            token = writer.write(token_id, time=now, **known)
            clock.lap("detokenize")
            yield token
            if token.finish_reason:
                return


def _one_by_one(
    decoder: Decoder,
    start: Prefilled,
    config: SampleConfig,
    random: "np.random.Generator | None",
    clock: Clock,
) -> Generator[tuple[int, np.ndarray]]:
    """Yield each token that is chosen, and the logits that it was chosen by."""
    seen, logits_V, V = list(start.prompt), start.logits_V, len(start.logits_V)
    while True:
        seen.append(sample(logits_V, seen, config, random))
        clock.lap("sample")
        yield seen[-1], logits_V
        logits_V = decoder.forward(start.cache, [Run(start.row, seen[-1:])])[0, :V]
        clock.lap("decode")


def scores(logits_V: np.ndarray, token_id: int, most: int) -> dict[str, Any]:
    """Return the log-probability of a token and the likeliest alternatives, as `Token` has them."""
    log_probs_V = logits_V - logits_V.max()
    log_probs_V -= np.log(np.exp(log_probs_V).sum(dtype=np.float64))
    best = np.arange(len(log_probs_V))[top_k(log_probs_V, most)] if most else []
    top = sorted(((int(i), float(log_probs_V[i])) for i in best), key=lambda one: -one[1])
    return {"logprob": float(log_probs_V[token_id]), "top": top}
