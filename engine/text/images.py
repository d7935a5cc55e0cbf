"""What a picture costs in tokens, where its maker has published the rule; otherwise None.

The size is read from the first bytes of a PNG, GIF, JPEG or WebP file.

Source: OpenAI, "Images and vision", calculating costs: a base and a price per 512-pixel tile.
"""

import base64
import binascii
import math
import re
import struct

# Tokens for the base and for each tile. Models that count 32-pixel patches are not here.
TILES = {
    "gpt-4-turbo": (85, 170),
    "gpt-4o": (85, 170),
    "gpt-4.1": (85, 170),
    "gpt-4.5-preview": (85, 170),
    "gpt-4o-mini": (2833, 5667),
    "gpt-5": (70, 140),
    "gpt-5-chat-latest": (70, 140),
    "o1": (75, 150),
    "o1-pro": (75, 150),
    "o3": (75, 150),
}
LARGEST, SHORTEST, TILE = 2048, 768, 512
JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame, not a table


def image_tokens(model: str, url: str, detail: str) -> int | None:
    """Return the tokens of a picture, or None where model, size or detail leave it open."""
    name = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model.rsplit("/", 1)[-1])
    if name not in TILES:
        return None
    base, each = TILES[name]
    if detail == "low":
        return base
    size = _data_url_size(url)
    return base + each * tiles(*size) if size and detail == "high" else None


def tiles(width: int, height: int) -> int:
    """Return how many tiles a picture has, scaled into 2048² and then to a short side of 768."""
    scale = min(1.0, LARGEST / max(width, height))
    scale *= min(1.0, SHORTEST / (min(width, height) * scale))
    # Rounding keeps 2048 × 1024 → 1536 × 768 from becoming a fraction more than three tiles.
    return math.prod(math.ceil(round(side * scale, 6) / TILE) for side in (width, height))


def _data_url_size(url: str) -> tuple[int, int] | None:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        return None
    try:
        return image_size(base64.b64decode(data, validate=True))
    except binascii.Error:
        return None


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a picture, or None if its first bytes do not tell."""
    try:
        size = _read_size(data)
    except (struct.error, IndexError):
        return None
    return size if size and min(size) > 0 else None


def _read_size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return struct.unpack(">II", data[16:24])
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return struct.unpack("<HH", data[6:10])
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at + 1] not in JPEG_SIZES:
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        height, width = struct.unpack(">HH", data[at + 5 : at + 9])
        return width, height
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    if kind == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None
