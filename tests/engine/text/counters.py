"""Counters that share one cache of ranks, and texts that have broken other tokenizers."""

import functools
import random
import tempfile
from pathlib import Path

import tiktoken

from engine.text.counting import Places, TokenCounter, counter_for

CACHE = tempfile.TemporaryDirectory(prefix="lm-ranks-")
PLACES = Places(cache=Path(CACHE.name), checkpoints=Path(CACHE.name))
ENCODED = ("cl100k_base", "o200k_base")

# tiktoken's own patterns, so that ours are not held against themselves.
PATTERNS = {
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
BITS = (
    *"aZé中🙂 \t\n\r/'^.0٣\0\x1c\x85\u00a0\u2028\u0301\u200dſKǅªⅫ",
    *("'s", "'LL", "'ſ", "\r\n", "  ", "\n\n", " the", "Word", "ation", "12345", "<|endoftext|>"),
    *("\ud800", "\udc00", "\ud83d\ude00", "😀", "कि", "สวัสดี", "אב", "한글", "\U000e0001"),
)


@functools.cache
def counter(name: str) -> TokenCounter:
    """Return the counter for a name."""
    return counter_for(name, places=PLACES)


@functools.cache
def reference(name: str) -> tiktoken.Encoding:
    """Return tiktoken's encoder, with ranks that are checked elsewhere."""
    ranks = counter(name).source.ranks.mapping  # type: ignore[attr-defined]
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})


def hostile(number: int, seed: int) -> list[str]:
    """Return random texts: of troublesome bits, of any characters, of runs of one character."""
    rnd = random.Random(seed)
    texts = []
    for i in range(number):
        size = rnd.randint(0, 24)
        match i % 4:
            case 0 | 1:
                texts.append("".join(rnd.choices(BITS, k=size)))
            case 2:
                top = rnd.choice((0x80, 0x800, 0x10000, 0x110000))
                texts.append("".join(chr(rnd.randrange(top)) for _ in range(size)))
            case _:
                texts.append(
                    "".join(rnd.choice(BITS) * rnd.randint(1, 90) for _ in range(size // 4))
                )
    return texts
