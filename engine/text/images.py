"""What a picture costs in tokens, where its maker has published the rule; otherwise None.

The size is read from the first bytes of a PNG, GIF, JPEG or WebP file.

Source: OpenAI, "Images and vision", calculating costs: a base and a price per 512-pixel tile, or
patches of 32 pixels times a factor. Anthropic, "Vision": an area over 750, after scaling down to
1,568 pixels and about 1,600 tokens; models from Claude Opus 4.7 on see more and are not here.
Google, "Understand and count tokens": 258 for a small picture, and for each tile of a large one.
"""

import base64
import math
import re
import struct
from fractions import Fraction

# Tokens for the base and for each tile.
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
# Tokens for each patch.
PATCHES = {
    "gpt-4.1-mini": Fraction("1.62"),
    "gpt-4.1-nano": Fraction("2.46"),
    "gpt-5-mini": Fraction("1.62"),
    "gpt-5-nano": Fraction("2.46"),
    "o4-mini": Fraction("1.72"),
}
PATCH, MOST_PATCHES = 32, 1536
CLAUDE = re.compile(r"(?:.*\.)?claude-(?:3|(?:opus|sonnet|haiku)-(?:3|4(?![.-]?[7-9]\b)))")
GEMINI = re.compile(r"gemini-2\.[05]-(?:pro|flash|flash-lite)(?!-image|-live|-native)\b")
JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame, not a table


def image_tokens(model: str, url: str, detail: str) -> int | None:
    """Return the tokens of a picture, or None where model, size or detail leave it open."""
    name = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model.rsplit("/", 1)[-1])
    if name in TILES and detail == "low":
        return TILES[name][0]
    if detail != "high" or not (size := _data_url_size(url)):
        return None
    if name in TILES:
        base, each = TILES[name]
        return base + each * tiles(*size)
    if name in PATCHES:
        return math.ceil(patches(*size) * PATCHES[name])
    if CLAUDE.match(name):
        return by_area(*size)
    return 258 * crops(*size) if GEMINI.match(name) else None


def tiles(width: int, height: int) -> int:
    """Return how many tiles a picture has, scaled into 2048² and then to a short side of 768."""
    scale = min(1.0, LARGEST / max(width, height))
    scale *= min(1.0, SHORTEST / (min(width, height) * scale))
    # Rounding keeps 2048 × 1024 → 1536 × 768 from becoming a fraction more than three tiles.
    return math.prod(math.ceil(round(side * scale, 6) / TILE) for side in (width, height))


def patches(width: int, height: int) -> int:
    """Return how many patches a picture has, scaled until there are no more than 1,536."""
    if math.ceil(width / PATCH) * math.ceil(height / PATCH) <= MOST_PATCHES:
        return math.ceil(width / PATCH) * math.ceil(height / PATCH)
    scale = math.sqrt(MOST_PATCHES * PATCH**2 / (width * height))
    sides = [side * scale / PATCH for side in (width, height)]
    # A little smaller still, so that one side is a whole number of patches.
    scale = min(max(1, math.floor(side)) / side for side in sides)
    return min(MOST_PATCHES, math.prod(math.ceil(round(side * scale, 6)) for side in sides))


def by_area(width: int, height: int) -> int:
    """Return about how many tokens Claude takes for a picture."""
    scale = min(1.0, 1568 / max(width, height))
    return min(1600, math.ceil(width * height * scale**2 / 750))


def crops(width: int, height: int) -> int:
    """Return how many tiles Gemini cuts a picture into."""
    if max(width, height) <= 384:
        return 1
    side = min(768, max(256, math.floor(min(width, height) / 1.5)))
    return math.ceil(width / side) * math.ceil(height / side)


def _data_url_size(url: str) -> tuple[int, int] | None:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        return None
    try:
        return image_size(base64.b64decode(data, validate=True))
    except ValueError:  # a letter that base64 does not have, or none at all of one
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
