"""How much text there is: exact if it was packed, near the truth if it is estimated."""

import pytest

from engine.data.amount import measure_text
from engine.data.corpora import open_corpus, scan
from engine.data.pack import pack, packed
from engine.errors import DataError
from engine.recipe import load
from engine.text.tokenizer import learn
from tests.conftest import ROOT


@pytest.fixture
def recipe():
    given = [f"data.train={ROOT / 'engine' / 'data'}", "data.format=text"]
    return load("", "test", [*given, "tokenizer.vocab_size=600"])


def tokenised(recipe, tokenizer, cache):
    text = scan(open_corpus(recipe.data.train, recipe.data), recipe.data.holdout)
    assert packed(text, None, tokenizer, recipe.data.holdout, cache) is None
    steps = pack(text, None, tokenizer, recipe.data.holdout, cache)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found = packed(text, None, tokenizer, recipe.data.holdout, cache)
            assert (
                found and found.cached and not end.value.cached and found.train == end.value.train
            )
            return end.value


def test_text_that_was_packed_is_counted_exactly(recipe, tokenizer, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    tokenizer.save(run, 100)
    before = measure_text(recipe, run, tmp_path / "cache")
    assert before and before.how.startswith("estimated from")
    shards = tokenised(recipe, tokenizer, tmp_path / "cache")
    after = measure_text(recipe, run, tmp_path / "cache")
    assert after and after.how == "" and after.vocabulary == tokenizer.vocab_size
    assert (after.tokens, after.held_tokens) == (shards.train.tokens, shards.valid.tokens)
    whole = after.tokens + after.held_tokens
    assert before.tokens + before.held_tokens == pytest.approx(whole, rel=0.02)


def test_without_a_tokenizer_one_is_learned_from_a_sample(recipe, tmp_path):
    found = measure_text(recipe, tmp_path, tmp_path / "cache")
    assert found and "tokenizer to be learned" in found.how
    texts = list(open_corpus(recipe.data.train, recipe.data).documents())
    real = learn(texts, recipe.tokenizer)
    tokens = sum(len(real.encode(text)) for text in texts)
    assert found.tokens + found.held_tokens == pytest.approx(tokens, rel=0.05)
    assert found.vocabulary == real.vocab_size == 600


def test_a_pipe_is_not_read_and_no_text_is_an_error(recipe, tmp_path):
    assert measure_text(load("", "test", ["data.train=-"]), tmp_path, tmp_path) is None
    with pytest.raises(DataError, match="no such file"):
        measure_text(load("", "test", ["data.train=/nowhere"]), tmp_path, tmp_path)


def test_of_very_much_text_only_the_beginning_is_read(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("engine.data.amount.READ", 1000)
    monkeypatch.setattr("engine.data.amount.SAMPLE", 500)
    tokenizer.save(tmp_path, 100)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(f"number {number:02} is read\n" * 20)
    (texts / "99.txt").write_bytes(b"\x00\xff" * 50)  # reading it would be an error
    recipe = load("", "test", [f"data.train={texts / '*.txt'}", "data.holdout=4"])
    found = measure_text(recipe, tmp_path, tmp_path)
    whole = 40 * len("number 00 is read\n") * 20 + 100
    assert found and found.how.startswith("estimated from 0.0 MB")
    assert found.tokens * found.bytes_per_token == pytest.approx(whole * 3 / 4, rel=0.01)
    assert found.held_tokens * found.bytes_per_token == pytest.approx(whole / 4, rel=0.01)
