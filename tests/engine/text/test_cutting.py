"""Cut to a limit: never over it when counted again, never less than it could be."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RecipeError
from engine.text.cutting import BLOCK, LOOK, blocks, fit, head, split, tail
from engine.text.encodings import BETWEEN_LINES, BETWEEN_WORDS
from tests.engine.text.counters import BITS, counter

WORDS = ["international ", "tokens", "\n", "  ", "x = 12345;\n", "中文", "don't ", "🙂🙂", "कि "]
TEXTS = st.lists(st.sampled_from([*BITS, *WORDS]), max_size=60).map("".join)
PROSE = "It was the best of times, it was the worst of times; 1775, and all that.\n" * 40


class Letters:
    """A tokenizer that only counts: three characters a token, and knows no place to cut."""

    cut = None

    def count(self, text):
        return -(-len(text) // 3)

    def lengths(self, text):
        return None


@functools.cache
def tokenizers():
    return [counter("cl100k_base").source, counter("o200k_base").source, Letters()]


@pytest.mark.parametrize("which", range(3))
@given(text=TEXTS, limit=st.integers(0, 40))
def test_head_and_tail_are_within_the_limit_and_maximal(which, text, limit):
    counts = tokenizers()[which]
    end, begin = head(text, limit, counts), tail(text, limit, counts)
    assert counts.count(text[:end]) <= limit and counts.count(text[begin:]) <= limit
    for more in range(1, LOOK):
        assert end + more > len(text) or counts.count(text[: end + more]) > limit
        assert begin - more < 0 or counts.count(text[begin - more :]) > limit


@pytest.mark.parametrize("which", range(3))
@given(text=TEXTS, limit=st.integers(0, 40))
def test_the_middle_is_what_goes(which, text, limit):
    counts = tokenizers()[which]
    kept = fit(text, limit, "middle", counts)
    assert counts.count(kept) <= limit
    if counts.count(text) <= limit:
        assert kept == text
    elif "\n…\n" in kept and "\n…\n" not in text:
        before, after = kept.split("\n…\n")
        assert text.startswith(before) and text.endswith(after)


@pytest.mark.parametrize("strategy", ["head", "tail", "middle"])
def test_a_limit_is_used_up_in_prose(strategy):
    counts = tokenizers()[1]
    for limit in (20, 100, 700):
        assert limit - 2 <= counts.count(fit(PROSE, limit, strategy, counts)) <= limit


@pytest.mark.parametrize("which", range(3))
@given(text=TEXTS, size=st.integers(8, 40), overlap=st.integers(0, 7))
def test_chunks_cover_the_text_and_overlap(which, text, size, overlap):
    counts = tokenizers()[which]
    end = 0
    for chunk in split(text, size, overlap, counts):
        assert counts.count(chunk) <= size and chunk
        begin = max(i for i in range(end + 1) if text[i : i + len(chunk)] == chunk)
        assert counts.count(text[begin:end]) <= overlap
        assert begin + len(chunk) > end
        end = begin + len(chunk)
    assert end == len(text)


def test_chunks_without_overlap_are_the_text():
    assert "".join(split(PROSE, 16, 0, tokenizers()[1])) == PROSE


def test_what_cannot_be_split_is_said():
    counts = tokenizers()[0]
    with pytest.raises(RecipeError, match="takes 3 tokens; chunks of 1"):
        list(split("a👍", 1, 0, counts))
    with pytest.raises(RecipeError, match="overlap"):
        list(split("text", 4, 4, counts))


@given(text=TEXTS, widths=st.lists(st.integers(1, 30), min_size=1), size=st.integers(4, 50))
def test_blocks_are_the_text(text, widths, size):
    chunks, at = [], 0
    for width in widths * (len(text) + 1):
        chunks.append(text[at : at + width])
        at += width
        if at >= len(text):
            break
    assert "".join(blocks(chunks, BETWEEN_LINES, size)) == text
    assert "".join(blocks(chunks, None, size)) == text


def test_blocks_stay_small_where_the_text_allows_it():
    stream = ("and so on " * 1000 for _ in range(200))
    sizes = [len(block) for block in blocks(stream, BETWEEN_LINES)]
    assert max(sizes) < BLOCK + 100 and len(sizes) > 5
    assert [len(b) for b in blocks(["x" * 1000] * 900, BETWEEN_LINES)] == [900_000]


@pytest.mark.parametrize("bit", ["9f3aB7", "中文很好，", "12.5,-3,", "Grüße-", "слово "])
@pytest.mark.parametrize("cut", [BETWEEN_LINES, BETWEEN_WORDS])
def test_blocks_stay_small_without_line_ends(bit, cut):
    """Base64, Chinese and numbers on one line were one block, counted by one core in Python."""
    sizes = [len(block) for block in blocks([bit * 1000] * 700, cut)]
    assert max(sizes) < BLOCK + 10 and len(sizes) > 5
