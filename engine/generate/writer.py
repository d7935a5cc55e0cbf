"""From a chosen id to a `Token`: the text that can be shown now, and whether it was the last.

One `Writer` stands behind each answer, whoever chooses the ids: a single stream or a batch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.generate.stop import StopMatcher
from engine.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token.

    `text` is what can be shown now: it lags behind the ids inside a character or a possible stop
    string, and the token with a `finish_reason` brings the rest.
    """

    id: int
    text: str
    logprob: float | None  # nats, before temperature and filters; None unless asked for
    top: list[tuple[int, float]]  # the likeliest alternatives and their log-probabilities
    time: float  # time.perf_counter() when it was chosen
    finish_reason: Literal["stop", "end", "length"] | None


class Writer:
    """Writes one answer: ends at an id of `ends`, a stop string or after `max_tokens`."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], max_tokens: int, ends: Collection[int]
    ) -> None:
        self.left = max_tokens  # tokens that may still come
        self._ends = ends
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopMatcher(stops)

    def write(
        self,
        token_id: int,
        *,
        time: float,
        logprob: float | None = None,
        top: Sequence[tuple[int, float]] = (),
    ) -> Token:
        """Add a token to the answer; nothing may follow one that has a `finish_reason`."""
        self.left -= 1
        ended = token_id in self._ends
        text = "" if ended else self._matcher.push(self._decoder.push(token_id))
        reason = "end" if ended else "stop" if self._matcher.hit else None
        if reason is None and self.left <= 0:
            reason = "length"
        if reason in ("end", "length"):
            text += self._matcher.push(self._decoder.flush()) + self._matcher.flush()
            reason = "stop" if self._matcher.hit else reason
        return Token(
            id=token_id, text=text, logprob=logprob, top=list(top), time=time, finish_reason=reason
        )
