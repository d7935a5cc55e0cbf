"""What did tuning cost elsewhere? Bits per byte on other texts, before and after.

The same documents are scored twice, so the difference is taken document by document: how hard each
one is drops out of its interval. An interval that does not hold 0 is learning or forgetting.

Source: Efron & Tibshirani 1993, chapters 8 and 13 (bootstrap of paired data, percentile interval).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.data.corpora import Corpus
from engine.errors import DataError
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer
from engine.train.evaluate import Score, score_documents

FEWEST = 8  # documents; of fewer, windows are the units
LEAST = 256  # bytes read of a document
RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """An even share of a text, cut into units that can be drawn again."""

    name: str
    units: Literal["documents", "windows"]
    tokens: list[np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """Bits per byte of one text before and after tuning; a difference above 0 is forgetting."""

    text: str
    units: Literal["documents", "windows"]
    n: int  # units
    bytes: int
    before: float
    after: float
    low: float  # of the difference, 95 %; both are nan for a single unit
    high: float

    @property
    def difference(self) -> float:
        """Return bits per byte after, less those before."""
        return self.after - self.before


def take(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    context: int,
    max_bytes: int,
    keep: Callable[[str], bool] = lambda document: True,
) -> Text:
    """Take about `max_bytes` bytes of a corpus: the same share of each document, its beginning.

    `keep` chooses documents by name, such as those held out. Where there are too many to say
    anything about each, every k-th is taken. The corpus is read twice, in flat memory.

    Raises: DataError if it cannot be read or if nothing is left.
    """
    sizes = [size for size, _ in _documents(corpus, keep)]
    if not any(sizes):
        raise DataError(f"{corpus.name}: no text to score")
    every = math.ceil(len(sizes) * LEAST / max(LEAST, max_bytes))
    share = min(1.0, max_bytes / sum(sizes[::every]))
    shares = (max(LEAST, math.ceil(share * size)) for size in sizes)
    wanted = [0 if number % every else size for number, size in enumerate(shares)]
    texts = [text for _, text in _documents(corpus, keep, wanted) if text]
    tokens = [np.array(ids) for ids in tokenizer.encode_batch(texts) if ids]
    return _cut(corpus.name, tokens, context)


def take_tokens(
    name: str,
    documents: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    *,
    context: int,
    max_bytes: int,
) -> Text:
    """Take about `max_bytes` bytes of documents that are tokens already, as `take` does."""
    size = sum(len(tokenizer.piece(int(token))) for ids in documents for token in ids)
    every = math.ceil(len(documents) * LEAST / max(LEAST, max_bytes))
    share = min(1.0, max_bytes * every / max(1, size))
    tokens = [ids[: math.ceil(share * len(ids))].astype(np.int64) for ids in documents[::every]]
    return _cut(name, tokens, context)


def _cut(name: str, tokens: list[np.ndarray], context: int) -> Text:
    """Make documents the units of a text, or their windows where they are too few."""
    if len(tokens) >= FEWEST:
        return Text(name=name, units="documents", tokens=tokens)
    cut = [ids[at : at + context] for ids in tokens for at in range(0, len(ids), context)]
    return Text(name=name, units="windows", tokens=cut)


def _documents(
    corpus: Corpus, keep: Callable[[str], bool], wanted: Sequence[int] = ()
) -> Iterator[tuple[int, str]]:
    """Yield the characters of each document kept, and so many of its first as are `wanted`."""
    size, number, text = 0, 0, ""
    for piece in corpus.pieces():
        if not keep(piece.document):
            continue
        size += len(piece.text)
        if number < len(wanted):
            text += piece.text[: max(0, wanted[number] - len(text))]
        if piece.end:
            yield size, text
            size, number, text = 0, number + 1, ""


def measure(model: Transformer, tokenizer: Tokenizer, text: Text, context: int) -> list[Score]:
    """Score each unit of a text."""
    return score_documents(model, tokenizer, text.tokens, context=context, stride=context)


def compare(text: Text, before: list[Score], after: list[Score], *, seed: int = 0) -> Forgetting:
    """Compare two measurements of one text, with an interval by drawing its units again."""
    bytes_U = np.array([unit.bytes for unit in before])
    bits_2U = np.array([[unit.nats for unit in side] for side in (before, after)]) / math.log(2)
    low = high = math.nan
    if len(before) > 1:
        drawn = np.random.default_rng(seed).integers(len(before), size=(RESAMPLES, len(before)))
        lost_U = bits_2U[1] - bits_2U[0]
        differences = lost_U[drawn].sum(1) / bytes_U[drawn].sum(1)
        low, high = (float(edge) for edge in np.quantile(differences, (0.025, 0.975)))
    size = int(bytes_U.sum())
    return Forgetting(
        text=text.name,
        units=text.units,
        n=len(before),
        bytes=size,
        before=float(bits_2U[0].sum() / size),
        after=float(bits_2U[1].sum() / size),
        low=low,
        high=high,
    )
