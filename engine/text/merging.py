"""Byte-pair encoding by rank: split a text into pieces, then merge the bytes of each.

Most pieces are tokens as they are, most of the others were met before, and counting needs each
distinct piece of a block only once. What is left is merged with a heap, so that a megabyte of one
letter takes no longer than a megabyte of prose. Long texts go to tiktoken's Rust, if it is
installed, with the same ranks and the same split.

Source: Sennrich et al. 2016, arXiv:1508.07909; the order of merges is tiktoken's: the lowest rank
first, the leftmost of equals.
"""

import os
import re
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

from engine.errors import DataError
from engine.text.cutting import blocks
from engine.text.encodings import Encoding
from engine.text.ranks import Ranks

REMEMBERED = 1 << 17  # pieces whose tokens are kept
MANY_PIECES = 1 << 13  # so many distinct pieces are worth a dictionary of all ranks
LONG_PIECE = 1 << 15  # bytes: a longer piece is merged in parts of that size, in Rust
TRIED_JOINTS = 64  # places where two parts may be joined, before they are merged as one
LONG_TEXT = 3 << 19  # ASCII characters: so long a text is worth it too
# tiktoken's Rust panics when a match goes back a million times, and one may go back three times for
# each character: a megabyte of spaces or capitals is too much for it, a block never.
TOO_LONG_FOR_RUST = 5 << 16
SHARED = 1 << 23  # characters: beyond them each thread gets an encoder of its own
PART = 1 << 10  # characters: where text is mixed, parts of it may still be ASCII
BEYOND_ASCII = 4  # what other text takes longer to split


def merge(piece: bytes, rank_of: Callable[[bytes], int | None]) -> list[int]:
    """Return where the tokens of `piece` begin, and its end, in n log n time."""
    size = len(piece)
    after, before = list(range(1, size + 1)), list(range(-1, size - 1))
    ranks = [rank_of(piece[i : i + 2]) for i in range(size - 1)]  # of a part and the next one
    ranks.append(None)
    heap = [(rank, i) for i, rank in enumerate(ranks) if rank is not None]
    heapify(heap)
    while heap:
        rank, left = heappop(heap)
        if ranks[left] != rank:
            continue  # one of the two has been merged with another since
        right = after[left]
        end = after[left] = after[right]
        ranks[right] = None
        if end < size:
            before[end] = left
        for start in (before[left], left):
            if start >= 0:
                middle = after[start]
                stop = after[middle] if middle < size else size
                found = rank_of(piece[start:stop]) if middle < size else None
                ranks[start] = found
                if found is not None:
                    heappush(heap, (found, start))
    starts, at = [], 0
    while at < size:
        starts.append(at)
        at = after[at]
    return [*starts, size]


class BytePairs:
    """One encoding at work."""

    def __init__(self, encoding: Encoding, ranks: Ranks) -> None:
        """Use `ranks` for `encoding`; nothing is compiled or loaded before it is needed."""
        self.encoding, self.ranks = encoding, ranks
        self._rank_of: Callable[[bytes], int | None] = ranks.get
        self._known: dict[str, Sequence[int]] = {}
        self._in_rust = False
        self._in_thread = threading.local()
        self._handed_out = 0  # characters that Rust was given

    def expect(self, characters: int) -> bool:
        """Prepare for so much text in many streams; True if several threads may count at once.

        Many small files are worth a start of Rust as one long file is.
        """
        self._in_rust = characters > LONG_TEXT and self.rust is not None
        return self._in_rust

    @cached_property
    def _ascii_split(self) -> re.Pattern[str]:
        return re.compile(self.encoding.ascii_split)

    @cached_property
    def _split(self) -> Any:
        import regex  # only text beyond ASCII needs it

        return regex.compile(self.encoding.split)

    @cached_property
    def rust(self) -> Any:
        """tiktoken's own encoder over our ranks, or None where it is not installed."""
        return self._rust(self.encoding.split)

    def _rust(self, split: str) -> Any:
        try:
            from tiktoken import Encoding as Rust
        except ImportError:
            return None
        name, ranks = self.encoding.name, self.ranks.mapping
        return Rust(name, pat_str=split, mergeable_ranks=ranks, special_tokens={})

    def split(self, text: str) -> list[str]:
        """Return the pieces of `text`; together they are the text."""
        if text.isascii():
            return self._ascii_split.findall(text)
        pieces: list[str] = []
        for part in blocks([text], self.cut, PART):
            pieces += (self._ascii_split if part.isascii() else self._split).findall(part)
        return pieces

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which nothing is special."""
        if _work(text) < LONG_TEXT:
            return self._encode(text)
        fast = self._encode_fast if self.rust is not None else self._encode
        return [token for block in blocks([text], self.cut) for token in fast(block)]

    def _encode_fast(self, text: str) -> list[int]:
        if len(text) > TOO_LONG_FOR_RUST:
            return self._encode(text)
        return self._own_rust(len(text)).encode_ordinary(scalar(text))

    def _own_rust(self, characters: int) -> Any:
        """Return the encoder for so much more text in this thread.

        Threads that share one wait for each other (its regexes have one lock), and another takes
        as long to make as a few megabytes to count.
        """
        self._handed_out += characters
        if self._handed_out < SHARED or threading.current_thread() is threading.main_thread():
            return self.rust
        if not hasattr(self._in_thread, "rust"):
            self._in_thread.rust = self._rust(self.encoding.split)
        return self._in_thread.rust

    def _encode(self, text: str) -> list[int]:
        pieces = self.split(scalar(text))
        known = self._learn(set(pieces))
        return [token for piece in pieces for token in known[piece]]

    def _learn(self, pieces: Collection[str]) -> dict[str, Sequence[int]]:
        """Return the tokens of pieces that are known, `pieces` among them."""
        if len(self._known) > REMEMBERED:
            self._known = {}  # another thread may still read the old one
        known = self._known
        if len(known) + len(pieces) > MANY_PIECES:
            self._rank_of = self.ranks.mapping.get
        if any(len(piece) > LONG_PIECE for piece in pieces):
            known = known.copy()  # what is so long will not come again
        for piece in pieces:
            if piece not in known:
                known[piece] = self._tokens(piece)
        return known

    def _tokens(self, piece: str) -> Sequence[int]:
        data = piece.encode()
        whole = self._rank_of(data)
        if whole is not None:
            return [whole]
        return self._merge(data) if len(data) <= LONG_PIECE else self._merge_in_parts(data)

    def _merge(self, data: bytes) -> list[int]:
        if len(data) >= LONG_PIECE:
            if self.rust is not None:
                return self.rust._encode_single_piece(data)
            self._rank_of = self.ranks.mapping.get
        bounds = merge(data, self._rank_of)
        ranks = [self._rank_of(data[a:b]) for a, b in pairwise(bounds)]
        return [rank for rank in ranks if rank is not None]

    def _merge_in_parts(self, data: bytes) -> Sequence[int]:
        """Return the tokens of a piece of any length, in flat memory but for themselves.

        Two parts whose tokens are known may be joined if the last token of one and the first of
        the other, merged as a text of two, come out as they are: a merge across the joint would
        have come to pass between these two alone as well, because merges elsewhere do not change
        the order of theirs.
        """
        tokens, start = array("I"), 0
        part = self._merge(data[:LONG_PIECE])
        while start + LONG_PIECE < len(data):
            lengths = self.ranks.lengths(part)
            end = start + sum(lengths)
            for last in range(len(part) - 1, max(0, len(part) - TRIED_JOINTS), -1):
                end -= lengths[last]
                following = self._merge(data[end : end + LONG_PIECE])
                pair = [part[last - 1], following[0]]
                if self._merge(b"".join(map(self.ranks.token, pair))) == pair:
                    break
            else:
                return self._merge(data)
            tokens.extend(part[:last])
            part, start = following, end
        tokens.extend(part)
        return tokens

    def count(self, text: str) -> int:
        """Return the number of tokens of `text`."""
        return self.count_stream([text])

    def count_stream(self, chunks: Iterable[str]) -> int:
        """Return the number of tokens of the text that `chunks` are the parts of.

        What turns out to be long is left to Rust on all cores, if it is installed.
        """
        stream = blocks(chunks, self.cut)
        if self._in_rust:  # other threads are at other texts
            return sum(map(self._count_fast, stream))
        first, work = [], 0
        while work < LONG_TEXT and (block := next(stream, None)) is not None:
            first.append(block)
            work += _work(block)
        everything = chain(first, stream)
        fast = work >= LONG_TEXT and self.rust is not None
        return sum(self._on_all_cores(everything) if fast else map(self._count, everything))

    def _on_all_cores(self, stream: Iterator[str]) -> Iterator[int]:
        """Count blocks in Rust, which lets other threads run, a few blocks at a time."""
        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[int]] = deque()
            for block in stream:
                waiting.append(pool.submit(self._count_fast, block))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            yield from (job.result() for job in waiting)

    def _count_fast(self, text: str) -> int:
        too_long = len(text) > TOO_LONG_FOR_RUST
        return self._count(text) if too_long else len(self._encode_fast(text))

    def _count(self, text: str) -> int:
        text = scalar(text)
        if len(text) > TOO_LONG_FOR_RUST:  # a list of its pieces may be too long as well
            pattern = self._ascii_split if text.isascii() else self._split
            pieces = Counter(map(itemgetter(0), pattern.finditer(text)))
        else:
            pieces = Counter(self.split(text))
        known = self._learn(pieces)
        return sum(times * len(known[piece]) for piece, times in pieces.items())

    def lengths(self, text: str) -> list[int]:
        """Return the number of bytes of each token of `text`."""
        return self.ranks.lengths(self.encode(text))

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of a token, of a special one its name."""
        names = {i: name for name, i in self.encoding.special.items()}
        if token_id in names:
            return names[token_id].encode()
        if not 0 <= token_id < self.ranks.size:
            raise DataError(f"{token_id} is not a token id of {self.encoding.name}")
        return self.ranks.token(token_id)

    @property
    def special(self) -> dict[str, int]:
        """The special tokens, which no text encodes to."""
        return self.encoding.special

    @property
    def cut(self) -> str:
        """The places that no token spans."""
        return self.encoding.cut


def _work(text: str) -> int:
    """Return how long splitting takes, in ASCII characters."""
    return len(text) if text.isascii() else BEYOND_ASCII * len(text)


def scalar(text: str) -> str:
    """Join pairs of surrogates; those without a partner become U+FFFD, as tiktoken does it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
