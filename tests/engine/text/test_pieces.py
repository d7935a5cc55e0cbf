"""The bytes of tokens, worked by hand, and against the decoders of the `tokenizers` library."""

import json

import pytest
from tokenizers import decoders

from engine.errors import CheckpointError
from engine.text.pieces import byte_alphabet, read_decoder

REPLACE = decoders.Replace("▁", " ")
LLAMA = [REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def spelling(decoder):
    return read_decoder(json.loads(decoder.__getstate__()))


def test_the_alphabet_is_the_librarys():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    for character, byte in alphabet.items():
        assert decoders.ByteLevel().decode([character]) == bytes([byte]).decode("utf-8", "replace")
    assert (alphabet["A"], alphabet["Ġ"], alphabet["Ċ"]) == (65, 32, 10)


@pytest.mark.parametrize(
    "decoder, name, data",
    [
        (decoders.ByteLevel(), "Ġcaf", b" caf"),
        (decoders.ByteLevel(), "Ã©", "é".encode()),
        (decoders.ByteLevel(), "Ã", b"\xc3"),
        (decoders.ByteLevel(), "two words", b"two words"),  # a space is no stand-in: taken as it is
        (decoders.ByteLevel(), "日", "日".encode()),
        (decoders.ByteLevel(), "Ã\xad", "Ã\xad".encode()),  # nor is U+00AD
        (decoders.Sequence(LLAMA), "▁the", b" the"),
        (decoders.Sequence(LLAMA), "<0xE2>", b"\xe2"),
        (decoders.Sequence(LLAMA), "<0xE2>x", b"<0xE2>x"),
        (decoders.Sequence([REPLACE]), "<0xE2>", b"<0xE2>"),
        (decoders.Metaspace("_"), "_a_", b" a "),
    ],
)
def test_pieces_worked_by_hand(decoder, name, data):
    assert spelling(decoder).bytes_of(name) == data


@pytest.mark.parametrize("decoder", [decoders.Sequence(LLAMA), decoders.Metaspace()])
def test_the_lead_is_what_the_library_takes_off(decoder):
    assert spelling(decoder).lead == b" "
    assert decoder.decode(["▁a", "▁b"]) == "a b"


@pytest.mark.parametrize(
    "decoder", [decoders.Sequence(LLAMA[:-1]), decoders.Metaspace(prepend_scheme="never")]
)
def test_without_a_prefix_nothing_is_taken_off(decoder):
    assert spelling(decoder).lead == b""
    assert decoder.decode(["▁a", "▁b"]) == " a b"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Strip(" ", 1, 0),  # of every token: only after Fuse is it the text's beginning
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    ],
)
def test_other_decoders_are_refused(decoder):
    with pytest.raises(CheckpointError, match="a step .* not supported; use a byte-level or"):
        spelling(decoder)
