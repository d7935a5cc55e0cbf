"""Our byte-pair encoding is tiktoken's: on hostile text, on long runs, in blocks, in Rust."""

import random
import re
import sys
from itertools import product

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError
from engine.text import merging
from engine.text.encodings import ENCODINGS
from engine.text.merging import BytePairs, merge, scalar
from tests.engine.text.counters import BITS, ENCODED, counter, hostile, reference

TEXTS = st.lists(st.sampled_from(BITS) | st.characters(), max_size=40).map("".join)


def fresh(name: str) -> BytePairs:
    known = counter(name).source
    assert isinstance(known, BytePairs)
    return BytePairs(known.encoding, known.ranks)


@pytest.mark.parametrize("name", ENCODED)
def test_ten_thousand_hostile_texts_encode_as_in_tiktoken(name):
    ours, theirs = fresh(name), reference(name)
    for text in hostile(10_000, seed=1):
        expected = theirs.encode_ordinary(text)
        assert ours.encode(text) == expected, ascii(text)
        assert ours.count(text) == len(expected)


@pytest.mark.parametrize("name", ENCODED)
def test_every_kind_of_character_encodes_as_in_tiktoken(name):
    """One of our two patterns relies on the regex package's Unicode, tiktoken on Rust's."""
    ours, theirs = fresh(name), reference(name)
    for first in range(0, 0x30000, 7):
        text = f"a{chr(first)}B {chr(first)}{chr(first)}1\n{chr(first)}"
        assert ours.encode(text) == theirs.encode_ordinary(text), hex(first)


@pytest.mark.parametrize("run", ["x", " ", "\n", "^", "\0", "A", "é", " \n", "ab", "0"])
@pytest.mark.parametrize("name", ENCODED)
def test_long_runs_encode_as_in_tiktoken(name, run, monkeypatch):
    monkeypatch.setattr(merging, "LONG_PIECE", 1 << 40)  # without Rust
    text = run * 20_000 + "y"
    assert fresh(name).encode(text) == reference(name).encode_ordinary(text)


@pytest.mark.parametrize("run", ["x", " ", "\n", "^^^^", "A", "\0"])
@pytest.mark.parametrize("name", ENCODED)
def test_a_megabyte_of_one_letter(name, run):
    """tiktoken itself panics on a megabyte of spaces or capitals; as one piece it can do them."""
    text = run * (1_000_000 // len(run))
    ours = fresh(name)
    ranks = ours.ranks.mapping
    whole = tiktoken.Encoding(name, pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    assert ours.split(text) == [text]
    assert ours.count(text) == len(whole.encode_ordinary(text))
    if run not in " A":
        assert ours.encode(text) == reference(name).encode_ordinary(text)


def test_merging_takes_n_log_n_lookups():
    """Twice the text, twice the work: lookups are counted, not seconds."""
    ranks = counter("cl100k_base").source.ranks.mapping  # type: ignore[attr-defined]

    def lookups(size: int) -> int:
        calls = 0

        def rank_of(token: bytes) -> int | None:
            nonlocal calls
            calls += 1
            return ranks.get(token)

        merge(b"x" * size, rank_of)
        return calls

    assert lookups(40_000) < 2.1 * lookups(20_000)


def test_the_examples_of_the_textbooks():
    cl100k = counter("cl100k_base")
    assert cl100k.encode("Hello, how are you today?") == [9906, 11, 1268, 527, 499, 3432, 30]
    assert cl100k.encode("The weather today is") == [791, 9282, 3432, 374]
    for text, ids in {
        "hello world": [15339, 1917],
        "rer": [38149],
        "'rer": [2351, 81],
        "today\n ": [31213, 198, 220],
        "today\n \n": [31213, 27907],
        "today\n  \n": [31213, 14211],
        " \x850": [220, 126, 227, 15],
        "👍": [9468, 239, 235],
    }.items():
        assert cl100k.encode(text) == ids


@pytest.mark.parametrize("name", ENCODED)
@given(text=TEXTS)
def test_tokens_give_back_the_text(name, text):
    ours = fresh(name)
    assert "".join(ours.split(scalar(text))) == scalar(text)
    assert b"".join(map(ours.piece, ours.encode(text))) == scalar(text).encode()
    assert sum(ours.lengths(text)) == len(scalar(text).encode())


@pytest.mark.parametrize("name", ENCODED)
@given(data=st.data(), text=TEXTS)
def test_no_piece_spans_a_cut(name, data, text):
    """The proof that streams may be cut there, whatever comes before and after."""
    ours = fresh(name)
    glue = data.draw(st.sampled_from(["a b", "end\nNext", ")\n(", "\n#", "中\n中", " x y "]))
    whole = scalar(text + glue + data.draw(TEXTS))
    for found in re.finditer(ours.cut, whole):
        at = found.start()
        assert ours.split(whole[:at]) + ours.split(whole[at:]) == ours.split(whole), ascii(whole)


KINDS = [
    "a",
    "S",
    "'",
    "1",
    "½",
    "中",
    "。",
    "-",
    "/",
    " ",
    "\t",
    "\n",
    "\r",
    "\u0301",
    "ʰ",
    "\x1c",
    "ǅ",
]


@pytest.mark.parametrize("name", [*ENCODED, "r50k_base"])
def test_no_piece_spans_a_cut_between_any_kinds_of_characters(name):
    """Every text of up to four characters, one for each kind that the patterns tell apart."""
    encoding = ENCODINGS[name]
    split, cuts = regex.compile(encoding.split).findall, 0
    for size in (2, 3, 4):
        for text in map("".join, product(KINDS, repeat=size)):
            for found in re.finditer(encoding.cut, text):
                at = found.start()
                cuts += 1
                assert split(text[:at]) + split(text[at:]) == split(text), (text, at)
    assert cuts > 10_000


@pytest.mark.parametrize("name", ENCODED)
@given(data=st.data(), run=st.text("abst", min_size=1, max_size=400))
def test_a_piece_merged_in_parts_has_the_tokens_of_the_whole(name, data, run):
    """Parts of a few bytes, so that joints are tried, moved, and given up."""
    ours = fresh(name)
    expected = ours._merge(run.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merging, "LONG_PIECE", data.draw(st.integers(2, 40)))
        patched.setattr(BytePairs, "rust", None)
        assert list(ours._merge_in_parts(run.encode())) == expected


def test_parts_joined_anywhere_would_be_wrong():
    """The control: between two parts of their own, tokens of the whole are lost."""
    ours = fresh("cl100k_base")
    apart = ours._merge(b"interna") + ours._merge(b"tionalisation")
    assert apart != ours._merge(b"internationalisation")


def test_places_that_look_like_cuts_but_are_none():
    """Controls: a piece does span these."""
    ours = fresh("o200k_base")
    for left, right in (("a ", "b"), (".\n", "/x"), ("\n", "\nb"), ("it", "'s"), ("12", "3")):
        assert ours.split(left) + ours.split(right) != ours.split(left + right)


@pytest.mark.parametrize("name", ENCODED)
def test_any_chunking_counts_as_the_whole(name, monkeypatch):
    monkeypatch.setattr("engine.text.cutting.BLOCK", 256)
    monkeypatch.setattr("engine.text.cutting.blocks.__defaults__", (256,))
    rnd = random.Random(3)
    text = scalar(
        "".join(
            t + rnd.choice([" and ", "\nThen ", "4Qz,0.5-7中文。好3", ""])
            for t in hostile(400, seed=5)
        )
    )
    expected = len(reference(name).encode_ordinary(text))
    for width in (1, 7, 100, 5_000, len(text)):
        chunks = [text[i : i + width] for i in range(0, len(text), width)]
        assert fresh(name).count_stream(chunks) == expected
        with monkeypatch.context() as patched:
            patched.setattr(merging, "LONG_TEXT", 1000)  # from there on in Rust, on all cores
            assert fresh(name).count_stream(chunks) == expected
            patched.setattr(merging, "SHARED", 1000)  # and there in an encoder for each thread
            assert fresh(name).count_stream(chunks) == expected


def test_without_rust_the_count_is_the_same(monkeypatch):
    text = "Once more, with feeling: 12345 times.\n" * 200_000
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    slow = fresh("o200k_base")
    assert slow.rust is None
    monkeypatch.undo()
    fast = fresh("o200k_base")
    assert fast.rust is not None and slow.count(text) == fast.count(text) == len(fast.encode(text))


def test_special_tokens_have_names_but_no_text_encodes_to_them():
    ours = fresh("o200k_base")
    assert ours.piece(199999) == b"<|endoftext|>"
    assert 199999 not in ours.encode("<|endoftext|>")
    for wrong in (-1, 199998, 10**9):
        with pytest.raises(DataError, match="not a token id"):
            ours.piece(wrong)
