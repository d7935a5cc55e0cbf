"""What bytes does a token stand for? Read from the decoder that a tokenizer.json describes.

Two conventions cover published models. Byte-level: each of the 256 bytes has a printable stand-in
character, so a token is a string of bytes. SentencePiece: a token is text with `▁` for a space, and
256 tokens named `<0x00>` … `<0xFF>` spell what no other token can.

Source: Radford et al. 2019 (the byte alphabet); Kudo and Richardson 2018, arXiv:1808.06226 (`▁`).
"""

import re
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.text.library import steps


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's map from printable stand-in characters to the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


# Maps a stand-in to its byte and any other character to one that Latin-1 cannot hold.
STAND_INS = {code: 0x2581 for code in range(256)} | {ord(c): b for c, b in byte_alphabet().items()}
BYTE_NAME = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How the names of tokens become bytes."""

    byte_level: bool
    byte_fallback: bool
    replaced: tuple[tuple[str, str], ...]  # (in the name, in the text)
    lead: bytes  # taken off the beginning of a text, where encoding had put it

    def bytes_of(self, name: str) -> bytes:
        """Return the bytes that a token stands for when it continues a text."""
        for old, new in self.replaced:
            name = name.replace(old, new)
        if self.byte_level:
            try:
                return name.translate(STAND_INS).encode("latin-1")
            except UnicodeEncodeError:  # not made of stand-ins: the name is the text
                return name.encode()
        if self.byte_fallback and (found := BYTE_NAME.fullmatch(name)):
            return bytes.fromhex(found[1])
        return name.encode()

    def byte_names(self) -> dict[int, str]:
        """Return the names of the tokens for single bytes, as far as there is a convention."""
        if self.byte_level:
            return {byte: stand_in for stand_in, byte in byte_alphabet().items()}
        return {byte: f"<0x{byte:02X}>" for byte in range(256)} if self.byte_fallback else {}


def read_decoder(decoder: dict[str, Any] | None) -> Spelling:
    """Read the `decoder` of a tokenizer.json.

    Raises: CheckpointError if it is of a kind that does not give text back exactly.
    """
    byte_level = byte_fallback = fused = False
    replaced: list[tuple[str, str]] = []
    lead = ""
    if decoder is None:
        raise CheckpointError("it has no decoder, so its tokens cannot become text again")
    for step in steps(decoder):
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme}:
                replaced.append((mark, " "))
                lead = "" if scheme == "never" else " "
            case {"type": "Strip", "content": str(mark), "start": 0 | 1 as start, "stop": 0} if (
                fused or not start
            ):
                lead = mark * start
            case _:
                raise CheckpointError(
                    f"its decoder has a step {step.get('type')} that is not supported; use a"
                    " byte-level or SentencePiece tokenizer"
                )
    return Spelling(
        byte_level=byte_level,
        byte_fallback=byte_fallback,
        replaced=tuple(replaced),
        lead=lead.encode(),
    )
