"""A conversation over one KV cache: each turn runs only what the cache does not hold yet.

The whole conversation is rendered anew for every answer, because a template may rewrite earlier
turns. What the cache and the new prompt have in common at the beginning is kept, the rest is
forgotten and run again, so the answer is the one that a fresh start would give.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.config import SampleConfig
from engine.errors import LimitError
from engine.generate.decode import Prefilled, generate, prefill
from engine.generate.decoder import Cache, Decoder
from engine.generate.prefixes import Prefixes, grid_of
from engine.generate.speculate import Guesser
from engine.generate.writer import Token
from engine.sampling_defaults import ANSWER
from engine.text.chat import Rendered, render
from engine.text.renderer import Renderer
from engine.text.tokenizer import Tokenizer


class Session:
    """The messages of a conversation and the cache of what the model has read of them."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: SampleConfig,
        renderer: Renderer,
        messages: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        guesser: Guesser | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.settings = settings  # max_tokens 0: as many as the context has room for
        self.renderer = renderer
        self.guesser = guesser
        self.variables = dict(variables or {})
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self.prefixes = prefixes
        self.reused = 0  # prompt tokens of the last answer that were in the cache already
        self.restored = 0  # those among them that came from the disk
        self._cache: Cache | None = None
        self._held: list[int] = []  # the tokens that the cache holds

    @property
    def context(self) -> int:
        """Return how many tokens a conversation may have."""
        return self.decoder.config.max_seq_len

    def prompt(self) -> Rendered:
        """Return what the model would read to answer now."""
        return render(
            self.messages, self.tokenizer, variables=self.variables, renderer=self.renderer
        )

    def answer(self, seed: int, stops: Sequence[str] = ()) -> Generator[Token]:
        """Answer the messages so far and, when done or abandoned, add the answer to them.

        Raises: LimitError if the conversation leaves no room for an answer.
        """
        ids = self.prompt().ids
        room = self.context - len(ids)
        if room < 1 or self.settings.max_tokens > room:
            raise LimitError(
                f"the conversation has {len(ids):,} of {self.context:,} tokens and leaves"
                f" {max(room, 0):,} for an answer; begin anew or take back a turn"
            )
        settings = replace(self.settings, max_tokens=self.settings.max_tokens or min(room, ANSWER))
        # Keys of answers, which were run token by token, may differ from a prompt's in some bit.
        exact = not self._held or grid_of(self.decoder) == 1
        prefixes = self.prefixes if exact else None
        start = self._read(ids, prefixes)
        self._held = list(ids)
        text: list[str] = []
        made: list[int] = []
        how = {"seed": seed, "stops": stops, "guesser": self.guesser}
        stream = generate(self.decoder, self.tokenizer, start, settings, **how)
        try:
            for token in stream:
                made.append(token.id)
                text.append(token.text)
                yield token
        finally:
            stream.close()
            # The newest token was chosen but not run, so the cache does not hold it.
            self._held += made[: start.cache.lengths[0] - len(ids)]
            self.messages.append({"role": "assistant", "content": "".join(text)})
            if prefixes:
                prefixes.store(self.decoder, start.cache, 0, ids)

    def _read(self, ids: list[int], prefixes: Prefixes | None) -> Prefilled:
        """Run the part of a prompt that the cache does not hold; at least its last token."""
        same = 0
        while same < min(len(self._held), len(ids) - 1) and self._held[same] == ids[same]:
            same += 1
        self._cache = self._cache or self.decoder.cache(self.context)
        try:
            self._cache.rewind(0, same)
        except ValueError:  # a sliding window has let go of what lies that far back
            self._cache = self.decoder.cache(self.context)
        self.restored = prefixes.restore(self.decoder, self._cache, 0, ids) if prefixes else 0
        self.reused = self._cache.lengths[0]
        return prefill(self.decoder, ids, self._cache)
