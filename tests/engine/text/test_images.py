"""Pictures: sizes read from real files of each format, tokens by the published examples."""

import base64
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.images import image_size, image_tokens, tiles


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)


def test_the_examples_of_the_published_rule():
    """OpenAI's three: 1024 × 1024 is four tiles, 2048 × 4096 is six, low detail is the base."""
    assert tiles(1024, 1024) == 4 and tiles(2048, 4096) == 6
    assert image_tokens("gpt-4o", url(png(1024, 1024)), "high") == 765
    assert image_tokens("gpt-4o", url(png(2048, 4096)), "high") == 1105
    assert image_tokens("openai/gpt-4o-2024-08-06", "https://x/y.png", "low") == 85


def test_small_pictures_are_not_scaled_up():
    assert tiles(1, 1) == tiles(512, 512) == 1 and tiles(513, 512) == 2
    assert tiles(2048, 1024) == 6, "1536 × 768"


def test_nothing_is_guessed():
    assert image_tokens("gpt-4o", "https://x/y.png", "high") is None, "the size is not known"
    assert image_tokens("gpt-4o-search", url(png(9, 9)), "high") is None, "another model"
    assert image_tokens("claude-opus-4-1", url(png(9, 9)), "low") is None
    assert image_tokens("gpt-4o", "data:image/png;base64,!", "high") is None
    assert image_tokens("gpt-4o", url(png(0, 9)), "high") is None


@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (300, 200), (1000, 7)])
def test_sizes_against_pillow(kind, size):
    pillow = pytest.importorskip("PIL.Image")
    for options in ({}, {"lossless": True}, {"progressive": True}):
        file = io.BytesIO()
        pillow.new("RGB", size, (1, 2, 3)).save(file, kind, **options)
        assert image_size(file.getvalue()) == size
    if kind == "WEBP":
        file = io.BytesIO()
        pillow.new("RGBA", size, (1, 2, 3, 4)).save(file, kind)
        assert image_size(file.getvalue()) == size


@given(st.binary(max_size=60), st.sampled_from([b"\xff\xd8", b"RIFF....WEBPVP8 ", b"GIF89a", b""]))
def test_hostile_bytes_have_no_size_or_a_real_one(data, start):
    size = image_size(start + data)
    assert size is None or min(size) > 0
