"""What `lm data check` says of rows: counted as they pass on their way to samples, in one reading.

seen = Passing(examples)                       counts kinds and duplicates
samples = make_samples(seen, …, tally=tally)   counts tokens, answers, what is too long
take_census(seen, tally)                       both as figures
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace

import numpy as np

from engine.data.examples import Example
from engine.data.samples import Sample, Tally
from engine.text.tokenizer import StreamDecoder, Tokenizer

BARS = 10  # of a histogram


class Passing:
    """Examples that are counted as they pass; `others` are digests of rows they may share."""

    def __init__(self, examples: Iterable[Example], others: Set[bytes] = frozenset()) -> None:
        self.examples, self.others = examples, others
        self.kinds: Counter[str] = Counter()
        self.digests: set[bytes] = set()
        self.duplicates = self.shared = 0

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples."""
        for example in self.examples:
            self.kinds[example.kind] += 1
            digest = bytes.fromhex(example.digest)[:16]
            self.duplicates += digest in self.digests
            self.shared += digest in self.others
            self.digests.add(digest)
            yield example


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """How many rows have from `low` to `high` tokens."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long rows are, in tokens, before anything is cut."""

    least: int
    median: int
    p90: int
    p99: int
    most: int
    mean: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """The figures of a set of rows."""

    kinds: dict[str, int]  # rows of each
    duplicates: int  # rows whose content an earlier row has
    shared: int  # rows whose content the other set has
    rows: int
    overlong: int
    dropped: int
    split: int
    cut: int
    cut_tokens: int
    samples: int
    tokens: int
    learned: int
    answers: int
    stops: int
    lookalikes: int
    lengths: Lengths | None  # None without rows


def take_census(passed: Passing, tally: Tally) -> Census:
    """Return the figures of examples that have passed and of the samples made of them."""
    counts = {name: getattr(tally, name) for name in Tally.__slots__ if name != "lengths"}
    return Census(
        kinds=dict(passed.kinds.most_common()),
        duplicates=passed.duplicates,
        shared=passed.shared,
        lengths=measure(tally.lengths),
        **counts,
    )


def measure(lengths: array) -> Lengths | None:
    """Return how lengths are spread; percentiles are lengths that occur, not between two."""
    if not lengths:
        return None
    found = np.sort(np.array(lengths))
    median, p90, p99 = (int(found[-(-len(found) * share // 100) - 1]) for share in (50, 90, 99))
    least, most = int(found[0]), int(found[-1])
    step = -(-(most - least + 1) // BARS)
    edges = range(least, most + 1, step)
    below = np.searchsorted(found, [*edges, edges[-1] + step])
    bars = [
        Bar(low=low, high=min(low + step - 1, most), rows=int(rows))
        for low, rows in zip(edges, np.diff(below), strict=True)
    ]
    return Lengths(
        least=least,
        median=median,
        p90=p90,
        p99=p99,
        most=most,
        mean=float(found.mean()),
        bars=tuple(bars),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token of a sample: what it adds to the text, and whether it is learned."""

    text: str
    id: int
    learned: bool
    control: bool  # written by the template or the program, never by content


def explain(sample: Sample, tokenizer: Tokenizer) -> list[Piece]:
    """Return the tokens of a sample; a character of several tokens is with the last of them."""
    decoder = StreamDecoder(tokenizer, start=True)
    pieces = []
    for token_id, learned in zip(sample.ids.tolist(), sample.learned.tolist(), strict=True):
        control = token_id in tokenizer.special
        text = decoder.push(token_id)
        pieces.append(Piece(text=text, id=token_id, learned=learned, control=control))
    if rest := decoder.flush():
        pieces[-1] = replace(pieces[-1], text=pieces[-1].text + rest)
    return pieces
