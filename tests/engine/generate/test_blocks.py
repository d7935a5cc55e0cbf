"""Blocks as files: keys by hand, every byte covered, whole or not at all."""

import hashlib
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generate.blocks import chain, digest, read, write

IDS = list(range(64 * 3 + 5))


def payload(size=20_000, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def saved(folder, data, index=1):
    block = chain("a model", IDS)[index]
    path = block.path(folder)
    path.parent.mkdir(exist_ok=True)
    write(path, block, data)
    return path, block


def test_keys_by_hand():
    """Oracle: the chain written out, and where the file lies."""
    model = hashlib.sha256(b"a model").digest()
    first = hashlib.sha256(model + struct.pack("<64i", *range(64))).digest()
    second = hashlib.sha256(first + struct.pack("<64i", *range(64, 128))).digest()
    blocks = chain("a model", IDS)
    assert [block.key for block in blocks[:2]] == [first, second] and len(blocks) == 3
    assert [block.index for block in blocks] == [0, 1, 2] and chain("a model", IDS[:63]) == []


@given(st.integers(0, 191), st.integers(0, 2**31 - 1))
def test_a_key_covers_every_token_before_its_end(place, other):
    changed = list(IDS)
    changed[place] = other
    same = [a.key == b.key for a, b in zip(chain("m", IDS), chain("m", changed), strict=True)]
    assert same == [other == IDS[place] or place // 64 > index for index in range(3)]
    assert all(a.key != b.key for a, b in zip(chain("m", IDS), chain("n", IDS), strict=True))


@pytest.mark.parametrize("size", [0, 1, 7, 8192, 20_000, 81_920])
def test_what_is_written_is_read(tmp_path, size):
    path, block = saved(tmp_path, payload(size))
    found, data = read(path)
    assert found == block and np.array_equal(data, payload(size))
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_size == 384 + size


def test_the_layout_by_hand(tmp_path):
    """Oracle: the offsets that docs/formats.md names."""
    path, block = saved(tmp_path, payload())
    data = path.read_bytes()
    assert data[:8] == b"lm block" and struct.unpack("<IIQ", data[8:24]) == (1, 1, 20_000)
    assert data[24:56] == hashlib.sha256(b"a model").digest() and data[56:88] == block.before
    assert struct.unpack("<64i", data[88:344]) == tuple(range(64, 128))
    words = np.frombuffer(data[384 : 384 + 16384], "<u8").reshape(2, 1024)
    sums = [int(a) + int(b) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF for a, b in words.T]
    rest = struct.pack("<1024Q", *sums) + data[384 + 16384 :]
    assert data[344:376] == hashlib.sha256(data[:344] + rest).digest()


@given(st.integers(0, 20_383), st.integers(1, 255))
def test_no_byte_may_change(tmp_path_factory, place, change):
    path, _ = saved(tmp_path_factory.mktemp("blocks"), payload())
    data = bytearray(path.read_bytes())
    data[place] ^= change
    path.write_bytes(data)
    with pytest.raises(ValueError):
        read(path)


def test_the_digest_sees_rows_move():
    data = payload(4 * 8192).reshape(4, 8192)
    digests = {digest(b"", data[order].reshape(-1)) for order in ([0, 1, 2, 3], [0, 2, 1, 3])}
    digests |= {digest(b"", np.zeros(size, np.uint8)) for size in (8192, 8192 * 2 + 1)}
    assert len(digests) == 4


def test_what_is_no_block_is_refused(tmp_path):
    path, block = saved(tmp_path, payload())
    whole = path.read_bytes()
    for data, why in [
        (b"", "no block"),
        (whole[:383], "no block"),
        (whole[:-1], "19,999 bytes of 20,000"),
        (whole + b"x", "20,001 bytes of 20,000"),
        (b"ml" + whole[2:], "does not begin"),
        (whole[:8] + b"\2" + whole[9:], "does not begin"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=why):
            read(path)
    path.write_bytes(whole)
    other = path.with_name("0" * 64 + ".kv")
    path.rename(other)
    with pytest.raises(ValueError, match="name of another"):
        read(other)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no block"):
        read(path)
    other.unlink()
    with other.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match="no block"):
        read(other)
    path.unlink()
    path.mkdir()
    with pytest.raises((ValueError, OSError)):
        read(path)
    assert block.index == 1


def test_a_write_that_fails_leaves_nothing(tmp_path):
    block = chain("a model", IDS)[0]
    path = block.path(tmp_path)
    path.mkdir(parents=True)  # cannot be replaced by a file
    with pytest.raises(OSError):
        write(path, block, payload())
    assert list(path.parent.iterdir()) == [path]
