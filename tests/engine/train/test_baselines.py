"""The dumb predictors, on texts whose figures are known."""

import lzma
import random

import pytest

from engine.train.baselines import baselines, ppmd_primed, unigram, xz_primed

RANDOM = random.Random(0).randbytes(20_000)
ENGLISH = (b"the quick brown fox jumps over the lazy dog and runs away. " * 200)[:8000]


def test_unigram_by_hand():
    """Training on 3 a and 1 b, plus one of each of 256: P(a) = 4/260, P(b) = 2/260."""
    from math import log2

    assert unigram(b"aaab", b"ab") == pytest.approx(-(log2(4 / 260) + log2(2 / 260)) / 2)


def test_noise_costs_eight_bits_whatever_came_before():
    fresh = random.Random(1).randbytes(20_000)
    for predictor in (unigram, xz_primed, ppmd_primed):
        assert predictor(RANDOM, fresh) == pytest.approx(8, abs=0.25)


def test_repeating_the_training_text_is_nearly_free():
    assert xz_primed(RANDOM, RANDOM) < 0.2  # a match is at most 273 bytes long
    assert ppmd_primed(ENGLISH, ENGLISH) < 0.1


def test_priming_helps():
    """Without the training text, the same held-out bytes cost more."""
    alone = 8 * len(lzma.compress(ENGLISH[:300], preset=9 | lzma.PRESET_EXTREME)) / 300
    assert xz_primed(ENGLISH, ENGLISH[:300]) < alone


def test_baselines_see_the_same_bytes_as_the_model(tmp_path, tokenizer):
    from engine.config import DataConfig
    from engine.data.corpora import open_corpus, scan
    from engine.data.pack import pack

    (tmp_path / "a.txt").write_bytes(ENGLISH)
    corpus = scan(open_corpus(str(tmp_path / "a.txt"), DataConfig()), 4)
    packing = pack(corpus, None, tokenizer, 4, tmp_path / "cache")
    while True:
        try:
            next(packing)
        except StopIteration as end:
            shards = end.value
            break
    rows = {row.name: row.bits_per_byte for row in baselines(shards, tokenizer, 500)}
    cut = shards.train.bytes
    train, valid = ENGLISH[:cut], ENGLISH[cut : cut + 500]
    assert rows["unigram (bytes)"] == pytest.approx(unigram(train, valid))
    assert rows["xz -9e, primed"] == pytest.approx(xz_primed(train, valid))
    assert rows["PPMd order 8, primed"] == pytest.approx(ppmd_primed(train, valid))
