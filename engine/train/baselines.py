"""Dumb predictors on the same bytes, so that a model's figure has something to stand beside.

A compressor that has just read the training text and then shrinks the held-out text is a language
model too: its size in bits over the bytes is comparable with ours. A transformer that does not beat
`xz` has learned little; PPMd of order 8 is the one to beat.
"""

import lzma
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.data.pack import Shards
from engine.text.tokenizer import Tokenizer

CHUNK = 1 << 18  # tokens turned into Python numbers at a time
PRIME_BYTES = 16 << 20  # most training text that a compressor is primed with: half a minute of xz


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One predictor's bits per byte on the held-out text; None says why it could not run."""

    name: str
    bits_per_byte: float | None
    note: str = ""


def baselines(shards: Shards, tokenizer: Tokenizer, valid_bytes: int) -> Iterator[Baseline]:
    """Yield each baseline's figure on the first `valid_bytes` of the held-out text.

    Each has seen the training text first, the last `PRIME_BYTES` of it at most.
    """
    per_token = max(1, shards.train.bytes // max(1, shards.train.tokens))
    prime = _text(shards.tokens("train")[-PRIME_BYTES // per_token :], tokenizer)[-PRIME_BYTES:]
    valid = _text(shards.tokens("valid")[: valid_bytes + shards.valid.documents], tokenizer)
    valid = valid[:valid_bytes]
    yield Baseline(name="unigram (bytes)", bits_per_byte=unigram(prime, valid))
    yield Baseline(name="xz -9e, primed", bits_per_byte=xz_primed(prime, valid))
    figure = ppmd_primed(prime, valid)
    note = "" if figure else "needs pyppmd: pip install 'lm-workbench[baselines]'"
    yield Baseline(name="PPMd order 8, primed", bits_per_byte=figure, note=note)


def _text(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Return the bytes that tokens spell, without end-of-text marks."""
    parts = (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))
    end = tokenizer.end_of_text
    return b"".join(tokenizer.decode_bytes(part[part != end].tolist()) for part in parts)


def unigram(train: bytes, valid: bytes) -> float:
    """Return the bits per byte of `valid` under the byte frequencies of `train`, plus one each."""
    counts = Counter(train)
    total = len(train) + 256
    bits = sum(n * -math.log2((counts[byte] + 1) / total) for byte, n in Counter(valid).items())
    return bits / len(valid)


def xz_primed(train: bytes, valid: bytes) -> float:
    """Return how many bits a byte `valid` adds to `train` in xz at its hardest setting."""

    def size(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(train + valid) - size(train)) / len(valid)


def ppmd_primed(train: bytes, valid: bytes) -> float | None:
    """Return how many bits a byte `valid` adds to `train` in PPMd var. H, order 8, 1 GiB of model.

    None if pyppmd is not installed. Source: Shkarin 2002, "PPM: one step to practicality".
    """
    try:
        import pyppmd
    except ImportError:
        return None

    def size(data: bytes) -> int:
        encoder = pyppmd.Ppmd7Encoder(8, 1 << 30)
        return len(encoder.encode(data)) + len(encoder.flush())

    return 8 * (size(train + valid) - size(train)) / len(valid)
