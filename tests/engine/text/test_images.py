"""Pictures: sizes read from real files of each format, tokens by the published examples."""

import base64
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.images import image_size, image_tokens, patches, tiles


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


def test_patches_of_32_pixels():
    """OpenAI's own: 1024 × 1024 is 1,024 patches, 1800 × 2400 is scaled to 33 × 44 of them."""
    assert patches(1024, 1024) == 1024 and patches(1800, 2400) == 1452
    assert patches(1, 1) == 1 and patches(10**6, 1) <= 1536
    assert image_tokens("gpt-4.1-mini", url(png(1024, 1024)), "high") == 1659  # × 1.62
    assert image_tokens("gpt-4.1-nano", url(png(1024, 1024)), "high") == 2520  # × 2.46
    assert image_tokens("o4-mini", url(png(1024, 1024)), "high") == 1762  # × 1.72


def test_the_examples_of_claude():
    """Anthropic's three, which it gives as about 54, 1334 and 1590; no picture is over 1,600."""
    for side, tokens in ((200, 54), (1000, 1334), (1092, 1590)):
        assert image_tokens("claude-sonnet-4-5", url(png(side, side)), "high") == tokens
    assert image_tokens("anthropic/claude-3-5-sonnet-20241022", url(png(9000, 9000)), "low") is None
    assert image_tokens("claude-opus-4-20250514", url(png(9000, 9000)), "high") == 1600
    assert image_tokens("claude-haiku-4-5", url(png(1568 * 2, 100)), "high") == 105


def test_the_tiles_of_gemini():
    """Google's own: up to 384 pixels one tile of 258, 960 × 540 six, cut every 360 pixels."""
    assert image_tokens("gemini-2.5-flash", url(png(384, 384)), "high") == 258
    assert image_tokens("google/gemini-2.0-flash", url(png(960, 540)), "high") == 6 * 258


def test_small_pictures_are_not_scaled_up():
    assert tiles(1, 1) == tiles(512, 512) == 1 and tiles(513, 512) == 2
    assert tiles(2048, 1024) == 6, "1536 × 768"


def test_nothing_is_guessed():
    assert image_tokens("gpt-4o", "https://x/y.png", "high") is None, "the size is not known"
    assert image_tokens("gpt-4o-search", url(png(9, 9)), "high") is None, "another model"
    assert image_tokens("claude-opus-4-7", url(png(9, 9)), "high") is None, "it sees more"
    assert image_tokens("gpt-5-mini", url(png(9, 9)), "low") is None
    assert image_tokens("gemini-3-pro-preview", url(png(9, 9)), "high") is None
    assert image_tokens("gpt-4o", "data:image/png;base64,é", "high") is None
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
