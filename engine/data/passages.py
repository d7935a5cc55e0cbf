"""Passages from all over a text: windows of tokens to calibrate by, and some kept to judge by.

They stand at even distances, so a large corpus is represented by a little of everything, and the
same text gives the same passages. Next on the arrow: `engine/calibrate.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.corpora import Corpus
from engine.errors import DataError
from engine.text.tokenizer import Tokenizer

LARGEST = 1 << 25  # characters of a corpus that are looked at
WIDTH = 10  # characters set aside for a token: more than it has on average
HELD = 6  # one passage in this many is kept to judge by
FEWEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """Token windows of one length. Shapes: learned, held (windows, T), int64."""

    learned: np.ndarray
    held: np.ndarray
    held_bytes: int
    sources: tuple[str, ...]
    digest: str  # sha256 of the text that is calibrated by


def gather(corpora: Sequence[Corpus], tokenizer: Tokenizer, length: int, windows: int) -> Passages:
    """Take about this many windows to calibrate by, from all corpora alike, and some to judge by.

    Raises: DataError if there is too little text.
    """
    each = max(FEWEST, round(windows * HELD / (HELD - 1) / len(corpora)))
    found = [
        (passage, ids)
        for corpus in corpora
        for passage in _spread(_beginning(corpus), length * WIDTH, each)
        if len(ids := tokenizer.prompt(passage.encode("utf-8", "replace"))) >= length
    ]
    names = tuple(corpus.name for corpus in corpora)
    if len(found) < FEWEST:
        raise DataError(
            f"{', '.join(names)}: too little text to calibrate by; {FEWEST * length * WIDTH:,}"
            " characters are enough"
        )
    judges = [index % HELD == 1 for index in range(len(found))]
    digest = hashlib.sha256()
    held_bytes = 0
    for (passage, ids), judge in zip(found, judges, strict=True):
        if judge:
            held_bytes += sum(len(tokenizer.pieces[id]) for id in ids[1:length])
        else:
            digest.update(passage.encode("utf-8", "replace"))
    whole, held = np.array([ids[:length] for _, ids in found], np.int64), np.array(judges)
    return Passages(
        learned=whole[~held],
        held=whole[held],
        held_bytes=held_bytes,
        sources=names,
        digest=digest.hexdigest(),
    )


def _beginning(corpus: Corpus) -> str:
    """Return the documents one after another, as many as are looked at."""
    parts, size = [], 0
    for piece in corpus.pieces():
        parts.append(piece.text + "\n\n" * piece.end)
        size += len(parts[-1])
        if size >= LARGEST:
            break
    return "".join(parts)


def _spread(text: str, size: int, count: int) -> list[str]:
    """Cut out up to `count` passages at even distances that do not overlap."""
    count = min(count, len(text) // size)
    return [text[start : start + size] for start in (i * len(text) // count for i in range(count))]
