"""A block of keys and values as a file, which says all that they depend on.

A block's key is the sha256 of the key of the block before it and of its own tokens; before the
first stands the sha256 of the decoder's identity. So a key covers the model and every token up to
the block's end, and equal keys mean equal keys and values.

Source: the block hashes of vLLM's prefix caching (Kwon et al. 2023, arXiv:2309.06180).
"""

import hashlib
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.generate.decoder import BLOCK

SUFFIX = ".kv"
TEMPORARY = ".tmp"
MAGIC, VERSION = b"lm block", 1
HEADER = struct.Struct("<8sIIQ32s32s256s")  # magic, version, index, bytes, model, before, ids
DIGEST = 40  # a sha256, and zeros that put the payload on a multiple of 64
LARGEST = 1 << 30  # bytes of a payload; a block of a model of 70 billion parameters has 1 << 24
ROW = 8192  # bytes that are weighed alike in the digest
ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a prompt: which one, of which model, after which other, of which tokens."""

    index: int
    model: bytes  # sha256 of the decoder's identity
    before: bytes  # key of the block before, or `model`
    ids: bytes  # 64 token ids as little-endian int32

    @property
    def key(self) -> bytes:
        """Return the sha256 of all that the block depends on."""
        return hashlib.sha256(self.before + self.ids).digest()

    def path(self, folder: Path) -> Path:
        """Return where the block lies below a folder."""
        return folder / self.model.hex()[:16] / f"{self.key.hex()}{SUFFIX}"

    def header(self, size: int) -> bytes:
        """Return the beginning of its file, for a payload of `size` bytes."""
        return HEADER.pack(MAGIC, VERSION, self.index, size, self.model, self.before, self.ids)


def chain(identity: str, ids: Sequence[int]) -> list[Block]:
    """Return the whole blocks that `ids` begin with; what is left over makes none."""
    model = before = hashlib.sha256(identity.encode()).digest()
    data = np.asarray(ids, "<i4").tobytes()
    size = 4 * BLOCK
    blocks = []
    for index in range(len(ids) // BLOCK):
        block = Block(index, model, before, data[index * size : (index + 1) * size])
        blocks.append(block)
        before = block.key
    return blocks


def write(path: Path, block: Block, payload: np.ndarray) -> None:
    """Write a block, which appears whole or not at all, whoever else writes it.

    It is not flushed to the disk: one that a power cut damages is found out by its digest.

    Raises: OSError.
    """
    header = block.header(len(payload))
    temporary = path.with_name(f".{path.stem[:16]}.{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(header + digest(header, payload).ljust(DIGEST, b"\0"))
            file.write(payload.data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[Block, np.ndarray]:
    """Read a block and its payload. Shapes: → uint8 (n,).

    Raises: OSError; ValueError saying what is wrong with the file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep us waiting
    try:
        about = os.fstat(descriptor)
        start = HEADER.size + DIGEST
        if not stat.S_ISREG(about.st_mode) or not start <= about.st_size <= start + LARGEST:
            raise ValueError(f"{about.st_size:,} bytes are no block")
        data = np.empty(about.st_size, np.uint8)
        if os.readv(descriptor, [data.data]) != len(data):
            raise ValueError("it is cut short")
    finally:
        os.close(descriptor)
    header = data[: HEADER.size].tobytes()
    magic, version, index, size, model, before, ids = HEADER.unpack(header)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"it does not begin as a block of version {VERSION}")
    payload = data[start:]
    if size != len(payload):
        raise ValueError(f"it has {len(payload):,} bytes of {size:,}")
    if data[HEADER.size : start].tobytes() != digest(header, payload).ljust(DIGEST, b"\0"):
        raise ValueError("its digest differs")
    block = Block(index, model, before, ids)
    if path.name != block.key.hex() + SUFFIX or path.parent.name != model.hex()[:16]:
        raise ValueError("it lies under the name of another block")
    return block, payload


def digest(header: bytes, payload: np.ndarray) -> bytes:
    """Return a sha256 of the header and of sums of the payload, as fast as memory is read.

    The payload is rows of 64-bit words; each row is weighed with an odd number of its own, then
    all are summed modulo 2^64. An odd factor loses nothing, so no change within one row leaves
    its sums equal. It is a proof against damage; whoever may write here could forge any digest.
    """
    whole = len(payload) // ROW * ROW
    words_RC = payload[:whole].view("<u8").reshape(-1, ROW // 8)
    weights_R = np.arange(len(words_RC), dtype=np.uint64) * np.uint64(ODD) | np.uint64(1)
    sums_C = np.einsum("r,rc->c", weights_R, words_RC)
    return hashlib.sha256(header + sums_C.tobytes() + payload[whole:].tobytes()).digest()
