"""Forgetting: an even share of every document, and a difference whose interval can be trusted."""

import math

import numpy as np
import pytest
import torch

from engine.config import DataConfig
from engine.data.corpora import Corpus, open_corpus
from engine.errors import DataError
from engine.finetune.forgetting import Text, compare, measure, take
from engine.train.evaluate import Score
from tests.conftest import TEXT, make_model


def corpus(sizes):
    texts = [(f"{k:03}", (TEXT * 20)[k : k + size]) for k, size in enumerate(sizes)]
    return Corpus(name="some", texts=texts)


def spelled(sample, tokenizer):
    return [tokenizer.decode(ids.tolist()) for ids in sample.tokens]


def test_every_document_gives_the_same_share_of_its_beginning(tokenizer):
    sizes = [1000 * k for k in range(1, 11)]
    whole = corpus(sizes)
    sample = take(whole, tokenizer, context=64, max_bytes=27_500)
    assert (sample.name, sample.units) == ("some", "documents")
    assert [len(text) for text in spelled(sample, tokenizer)] == [size // 2 for size in sizes]
    for text, (_, full) in zip(spelled(sample, tokenizer), whole.texts, strict=True):
        assert full.startswith(text)


def test_of_too_many_documents_every_kth_is_taken(tokenizer):
    sample = take(corpus([1000] * 100), tokenizer, context=64, max_bytes=256 * 20)
    assert len(sample.tokens) == 20
    assert sum(len(text) for text in spelled(sample, tokenizer)) == 256 * 20


def test_all_is_taken_where_it_fits_and_only_what_is_kept(tokenizer):
    whole = corpus([300] * 30)
    sample = take(
        whole, tokenizer, context=64, max_bytes=1 << 20, keep=lambda name: int(name) % 3 == 0
    )
    assert spelled(sample, tokenizer) == [text for _, text in whole.texts[::3]]


def test_a_single_text_is_cut_into_windows(tokenizer):
    sample = take(corpus([3000]), tokenizer, context=50, max_bytes=1 << 20)
    assert sample.units == "windows"
    assert {len(ids) for ids in sample.tokens[:-1]} == {50}
    ids = [token for window in sample.tokens for token in window.tolist()]  # may part a character
    assert tokenizer.decode(ids) == corpus([3000]).texts[0][1]


def test_long_documents_in_pieces_are_read_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.documents.PIECE", 100)
    file = tmp_path / "a.txt"
    file.write_text("é" + TEXT[:2000], encoding="utf-8")
    found = open_corpus(str(file), DataConfig())
    sample = take(found, tokenizer, context=64, max_bytes=1000)
    assert "".join(spelled(sample, tokenizer)) == ("é" + TEXT)[:1000]


def test_nothing_to_score_is_an_error(tokenizer):
    with pytest.raises(DataError, match="some: no text to score"):
        take(corpus([500]), tokenizer, context=64, max_bytes=100, keep=lambda name: False)


def scores(nats, size=100):
    return [Score(nats=float(one), tokens=10, bytes=size) for one in nats]


SAMPLE = Text(name="t", units="documents", tokens=[])


def test_before_after_and_difference_are_bits_per_byte():
    found = compare(SAMPLE, scores([100, 200, 300]), scores([110, 210, 310]))
    assert found.before == pytest.approx(600 / math.log(2) / 300)
    assert found.difference == pytest.approx(30 / math.log(2) / 300)
    # Every unit lost the same: whichever are drawn, the difference is that one.
    assert (found.low, found.high) == pytest.approx((found.difference, found.difference))
    assert (found.n, found.bytes) == (3, 300)


def test_the_interval_is_that_of_a_mean_of_pairs():
    """For many units of one size the bootstrap must agree with the normal approximation."""
    random = np.random.default_rng(5)
    before = random.uniform(100, 900, 200)
    lost = random.normal(3, 10, 200)
    found = compare(SAMPLE, scores(before), scores(before + lost))
    unit = 100 * math.log(2)
    half = 1.96 * lost.std(ddof=1) / math.sqrt(200) / unit
    assert found.low == pytest.approx(lost.mean() / unit - half, abs=0.15 * half)
    assert found.high == pytest.approx(lost.mean() / unit + half, abs=0.15 * half)
    # The control: taken unpaired, how hard the documents are would swamp it.
    assert before.std() > 10 * lost.std()
    again = compare(SAMPLE, scores(before), scores(before + lost))
    assert (again.low, again.high) == (found.low, found.high)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random, held = np.random.default_rng(7), 0
    for _ in range(200):
        before = random.uniform(100, 900, 60)
        found = compare(SAMPLE, scores(before), scores(before + random.normal(2, 5, 60)))
        held += found.low <= 2 / 100 / math.log(2) <= found.high
    assert 178 <= held <= 199  # 95 % of 200 is 190


def test_one_unit_has_no_interval():
    found = compare(SAMPLE, scores([100]), scores([90]))
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.difference < 0


def test_a_spoilt_model_has_forgotten_and_the_same_model_has_not(tokenizer):
    sample = take(corpus([400] * 12), tokenizer, context=64, max_bytes=1 << 20)
    model = make_model()
    before = measure(model, tokenizer, sample, 64)
    same = compare(sample, before, measure(model, tokenizer, sample, 64))
    assert same.difference == same.low == same.high == 0
    with torch.no_grad():
        model.lm_head.weight *= 3
    spoilt = compare(sample, before, measure(model, tokenizer, sample, 64))
    assert spoilt.low > 0
