"""The merge ranks of a published encoding, looked up straight from a file.

Building a dictionary of 200,000 tokens takes longer than counting a page of text. So the table lies
on disk as it is used: a hash table of ranks with open addressing, where each token begins, and the
bytes of all tokens in the order of their ranks. Opening it is one read and one checksum.

Next on the arrow: `engine/text/merging.py`.
"""

import base64
import hashlib
import os
import struct
import zlib
from array import array
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from engine.errors import CheckpointError

HEADER = struct.Struct("=8s32sI")  # magic, sha256 of the source, checksum of the rest
SIZES = struct.Struct("=II")  # tokens, slots
FRONT = HEADER.size + SIZES.size
MAGIC = b"lm-ranks"
WORD = 4  # bytes of a number


class Ranks:
    """Token bytes to rank and back. A token's rank is its id: the lower, the earlier merged."""

    def __init__(self, table: bytes, tokens: int, slots: int) -> None:
        """Use a table that `build` made; `read_ranks` checks one from disk."""
        numbers = memoryview(table)[FRONT : FRONT + (slots + tokens + 1) * WORD]
        self._slots, self._starts = numbers.cast("I")[:slots], numbers.cast("I")[slots:]
        self._spelled = table[FRONT + numbers.nbytes :]
        self._mask = slots - 1
        self.size = tokens

    def get(self, token: bytes) -> int | None:
        """Return the rank of `token`, or None if it is not one."""
        slots, starts, mask = self._slots, self._starts, self._mask
        at = zlib.crc32(token) & mask
        while entry := slots[at]:
            if self._spelled[starts[entry - 1] : starts[entry]] == token:
                return entry - 1
            at = at + 1 & mask
        return None

    def lengths(self, ranks: Iterable[int]) -> list[int]:
        """Return how many bytes each of these tokens has."""
        starts = self._starts
        return [starts[rank + 1] - starts[rank] for rank in ranks]

    def token(self, rank: int) -> bytes:
        """Return the bytes of the token with this rank; none for a rank that is left out."""
        return self._spelled[self._starts[rank] : self._starts[rank + 1]]

    @cached_property
    def mapping(self) -> dict[bytes, int]:
        """All ranks as a dictionary: worth its making only for a lot of text."""
        starts, spelled = self._starts.tolist(), self._spelled
        mapping = {spelled[a:b]: rank for rank, (a, b) in enumerate(pairwise(starts))}
        mapping.pop(b"", None)
        return mapping


def build(source: bytes) -> bytes:
    """Return the table for a rank file: lines of a token in base64, a space and its rank.

    Raises: CheckpointError if that is not what `source` is.
    """
    try:
        pairs = [line.split() for line in source.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise CheckpointError(f"not a rank file: {error}") from None
    tokens = max(ranks.values(), default=-1) + 1
    if not ranks or min(ranks.values()) < 0 or tokens > 4 * len(ranks) or b"" in ranks:
        raise CheckpointError("not a rank file: its ranks are not counted from 0")
    slots = 1 << (2 * tokens).bit_length()
    table, spelled = array("I", bytes(slots * WORD)), [b""] * tokens
    for token, rank in ranks.items():
        at = zlib.crc32(token) & slots - 1
        while table[at]:
            at = at + 1 & slots - 1
        table[at] = rank + 1
        spelled[rank] = token
    starts = array("I", [0])
    for token in spelled:
        starts.append(starts[-1] + len(token))
    body = b"".join([SIZES.pack(tokens, slots), table.tobytes(), starts.tobytes(), *spelled])
    return HEADER.pack(MAGIC, hashlib.sha256(source).digest(), zlib.crc32(body)) + body


def read_ranks(table: bytes, digest: str) -> Ranks | None:
    """Return what `table` holds, or None unless it is whole and its source has that sha256."""
    if len(table) < FRONT:
        return None
    magic, made_from, checksum = HEADER.unpack_from(table)
    whole = zlib.crc32(memoryview(table)[HEADER.size :]) == checksum
    if magic != MAGIC or made_from.hex() != digest or not whole:
        return None
    tokens, slots = SIZES.unpack_from(table, HEADER.size)
    numbers = FRONT + (slots + tokens + 1) * WORD
    if slots != 1 << (2 * tokens).bit_length() or len(table) < numbers:
        return None
    table_of_slots = memoryview(table)[FRONT : FRONT + slots * WORD].cast("I")
    (spelled,) = struct.unpack_from("=I", table, numbers - WORD)
    if 0 not in table_of_slots or spelled != len(table) - numbers:  # without a 0 no search ends
        return None
    return Ranks(table, tokens, slots)


def keep(path: Path, table: bytes) -> None:
    """Store a table beside the others, whole or not at all; a disk that refuses is no harm."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(table)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
