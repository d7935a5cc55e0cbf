"""How many tokens is a text, for the model that will read it? Exact, or an estimate that says so.

A counter reads text as text: what looks like a special token counts as the characters it is.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from engine.errors import RecipeError
from engine.text import cutting
from engine.text.cutting import Counts, Strategy
from engine.text.encodings import ENCODINGS, open_ranks
from engine.text.merging import BytePairs
from engine.text.models import Model, resolve

# What OpenAI's chat models add: to each message, to a message with a name, and once for the reply.
CHAT_FRAME = (3, 1, 3)
# Of the 400,000 tokens of the GPT-5 models 128,000 are kept for the answer.
# Source: OpenAI's pages of models, "max input tokens".
INPUT_LIMITS = {("gpt-5", 400_000): 272_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where tokenizers may be found."""

    cache: Path  # our own
    tiktoken_cache: Path | None = None
    checkpoints: Path = Path("checkpoints")
    ranks: Path | None = None  # a rank file, or a folder of them


class Source(Counts, Protocol):
    """A tokenizer to count with: an encoding's, or a file's."""

    @property
    def special(self) -> dict[str, int]:
        """The special tokens."""
        ...

    def count_stream(self, chunks: Iterable[str]) -> int:
        """Return the number of tokens of all chunks together."""
        ...

    def expect(self, characters: int) -> bool:
        """Prepare for so much text; True if several threads may count at once."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids."""
        ...

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of one token."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenCounter:
    """The tokenizer of one model, or the best that can be said about it."""

    name: str  # as the user wrote it
    tokenizer: str
    exactness: Literal["exact", "estimated"] = "exact"
    plus_minus: float = 0.0  # nine of ten documents are off by no more than this share
    frame: tuple[int, int, int] | None = None
    window: int | None = None
    input_limit: int | None = None  # where the prompt may not fill the window
    factor: float = 1.0
    source: Source = field(repr=False)

    def count(self, text: str) -> int:
        """Return the number of tokens of `text`."""
        return round(self.factor * self.source.count(text))

    def count_stream(self, chunks: Iterable[str]) -> int:
        """Return the number of tokens of a text that comes in chunks, however it is chunked."""
        return round(self.factor * self.source.count_stream(chunks))

    def expect(self, characters: int) -> bool:
        """Prepare for so much text in many streams; True if several threads may count at once."""
        return self.source.expect(characters)

    def interval(self, tokens: int) -> tuple[int, int]:
        """Return between what an estimated count lies for nine of ten documents."""
        return round(tokens * (1 - self.plus_minus)), round(tokens * (1 + self.plus_minus))

    def fits(
        self, tokens: int, answer: int = 0, *, at_least: bool = False, window: int | None = None
    ) -> bool | None:
        """Tell whether a prompt and its answer fit the context; None if that cannot be known.

        `at_least`: something was not counted. `window` overrides the model's own.
        """
        room = window or self.window
        if room is None:
            return None
        most = room - answer
        if window is None and self.input_limit is not None:
            most = min(most, self.input_limit)
        low, high = self.interval(tokens)
        if low > most:
            return False
        return True if high <= most and not at_least else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Raises: RecipeError if counts are only estimated."""
        self._must_be_exact()
        return self.source.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`. Raises: RecipeError if counts are only estimated."""
        self._must_be_exact()
        return b"".join(map(self.source.piece, ids))

    def pieces(self, text: str) -> list[tuple[int, bytes]]:
        """Return each token of `text` with its bytes."""
        return [(token_id, self.source.piece(token_id)) for token_id in self.encode(text)]

    def special_spans(self, text: str) -> list[tuple[int, int, str]]:
        """Return where `text` looks like a special token: begin, end and name."""
        if not self.source.special:
            return []
        return [(m.start(), m.end(), m[0]) for m in self._special.finditer(text)]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        names = sorted(self.source.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    def fit(self, text: str, limit: int, strategy: Strategy = "head") -> str:
        """Return as much of `text` as counts at most `limit`: its head, tail, or both.

        Where counts are estimated, the upper end of the estimate is at most `limit`.
        """
        return cutting.fit(text, self._limit(limit), strategy, self.source)

    def split(self, text: str, size: int, overlap: int = 0) -> Iterator[str]:
        """Yield chunks that count at most `size`, each repeating up to `overlap` of the last.

        Raises: RecipeError if the overlap is too large, or `size` less than one character takes.
        """
        return cutting.split(text, self._limit(size), self._limit(overlap), self.source)

    def _limit(self, limit: int) -> int:
        """Return how many tokens of the source make at most `limit`, by an estimate's upper end."""
        most = math.ceil((limit + 1) / (self.factor * (1 + self.plus_minus))) + 1
        fits = (n for n in range(most, 0, -1) if self.interval(round(self.factor * n))[1] <= limit)
        return next(fits, 0)

    def _must_be_exact(self) -> None:
        if self.exactness != "exact":
            raise RecipeError(
                f"{self.name}: its tokenizer is not published, so tokens can be estimated but not"
                " shown; choose an exact one, like o200k_base"
            )


def counter_for(model: str, *, places: Places) -> TokenCounter:
    """Return the counter for a model name, an encoding, a tokenizer.json or a checkpoint.

    Raises: RecipeError with the nearest names if it is unknown, ResourceError if its ranks are not
        on this machine, CheckpointError if its file is broken.
    """
    for path in (Path(model), places.checkpoints / model):
        named = path.suffix == ".json" and os.path.isfile(path)
        if named or os.path.isfile(path / "tokenizer.json"):  # False for names too long to be one
            from engine.text.fromfile import FromFile  # brings the tokenizers package

            return TokenCounter(name=model, tokenizer=_title(path), source=FromFile(path))
    return _published(model, resolve(model), places)


def _title(path: Path) -> str:
    return f"{path.name} (tokenizer.json)" if path.is_dir() else str(path)


def _published(name: str, model: Model, places: Places) -> TokenCounter:
    encoding = ENCODINGS[model.encoding]
    ranks = open_ranks(
        encoding, cache=places.cache, tiktoken_cache=places.tiktoken_cache, given=places.ranks
    )
    estimate = model.estimate
    return TokenCounter(
        name=name,
        tokenizer=encoding.name,
        exactness="estimated" if estimate else "exact",
        plus_minus=estimate.plus_minus if estimate else 0.0,
        factor=estimate.factor if estimate else 1.0,
        frame=CHAT_FRAME if model.chat else None,
        window=model.window,
        input_limit=INPUT_LIMITS.get((model.name[:5], model.window or 0)),
        source=BytePairs(encoding, ranks),
    )
