"""The table of ranks on disk: every token found, no other, and never trusted when damaged."""

import base64
import hashlib
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.text.ranks import HEADER, MAGIC, SIZES, build, keep, read_ranks

TOKENS = [b"a", b"b", b"ab", b"\x00", b"\xff\xfe", b" the", b"abab"]


def source(tokens, skip=()) -> bytes:
    numbers = (i for i in range(len(tokens) + len(skip)) if i not in skip)
    pairs = zip(tokens, numbers, strict=True)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in pairs)


def opened(content: bytes):
    ranks = read_ranks(build(content), hashlib.sha256(content).hexdigest())
    assert ranks is not None
    return ranks


@given(tokens=st.lists(st.binary(min_size=1, max_size=6), min_size=1, unique=True))
def test_a_table_holds_what_its_source_says(tokens):
    ranks = opened(source(tokens))
    expected = {token: rank for rank, token in enumerate(tokens)}
    assert ranks.mapping == expected
    for token, rank in expected.items():
        assert ranks.get(token) == rank
        assert ranks.token(rank) == token
        assert ranks.get(token + b"?") == expected.get(token + b"?")
    assert ranks.lengths(range(ranks.size)) == [len(token) for token in tokens]


def test_a_rank_may_be_left_out():
    """p50k_base has a gap where its special token is."""
    ranks = opened(source(TOKENS, skip={3}))
    assert ranks.token(3) == b"" and ranks.get(TOKENS[3]) == 4
    assert len(ranks.mapping) == len(TOKENS)


def test_any_damaged_byte_is_noticed():
    content = source(TOKENS)
    whole, digest = build(content), hashlib.sha256(content).hexdigest()
    assert read_ranks(whole, digest) is not None
    rnd = random.Random(0)
    for _ in range(300):
        at = rnd.randrange(len(whole))
        broken = whole[:at] + bytes([whole[at] ^ rnd.randrange(1, 256)]) + whole[at + 1 :]
        assert read_ranks(broken, digest) is None, at
    for cut in range(0, len(whole), 7):
        assert read_ranks(whole[:cut], digest) is None
    assert read_ranks(whole, "0" * 64) is None


def test_sizes_that_cannot_be_are_noticed_though_the_checksum_is_right():
    """A table without an empty slot was searched for ever."""
    content = source(TOKENS)
    whole, digest = build(content), hashlib.sha256(content).hexdigest()
    slots = SIZES.unpack_from(whole, HEADER.size)[1]

    def opened_with(body: bytes):
        front = HEADER.pack(MAGIC, bytes.fromhex(digest), zlib.crc32(body))
        return read_ranks(front + body, digest)

    body = whole[HEADER.size :]
    assert opened_with(body) is not None
    for sizes in ((7, slots * 2), (7, 0), (10**6, slots), (0, 1), (2**32 - 1, 2**31)):
        assert opened_with(SIZES.pack(*sizes) + body[SIZES.size :]) is None
    full = b"\1\0\0\0" * slots
    assert opened_with(body[: SIZES.size] + full + body[SIZES.size + len(full) :]) is None
    assert opened_with(body + b"x") is None


@pytest.mark.parametrize(
    "wrong",
    [b"", b"hello", b"YQ== x\n", b"YQ== -1\n", b"YQ== 99999999999\n", b"!!! 0\n", b"YQ== 0 0\n"],
)
def test_what_is_no_rank_file_is_refused(wrong):
    with pytest.raises(CheckpointError, match="not a rank file"):
        build(wrong)


def test_a_folder_that_cannot_be_written_is_no_harm(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    keep(blocked / "x.ranks", b"data")
    keep(tmp_path / "new" / "x.ranks", b"data")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.ranks"]
