"""Windows of text to calibrate by, and others to judge by."""

import numpy as np
import pytest

from engine.config import DataConfig
from engine.data.corpora import Corpus, open_corpus
from engine.data.passages import WIDTH, gather
from engine.errors import DataError


def corpus(name, *texts):
    return Corpus(name=name, texts=[(f"{i:04}", text) for i, text in enumerate(texts)])


def numbered(count):
    return " ".join(f"{i:05}" for i in range(count))


def spelled(tokenizer, window):
    return tokenizer.decode([int(id) for id in window])


def test_what_judges_was_never_learned_and_all_come_from_all_over(tokenizer):
    found = gather([corpus("n", numbered(20000))], tokenizer, 32, 30)
    assert found.learned.shape == (30, 32) and found.held.shape == (6, 32)
    assert found.learned.dtype == found.held.dtype == np.int64
    learned, held = (
        [{word for word in spelled(tokenizer, row).split(" ") if len(word) == 5} for row in rows]
        for rows in (found.learned, found.held)
    )
    assert not set.union(*learned) & set.union(*held)
    starts = sorted(int(min(words)) for words in learned)
    gaps = np.diff(starts)
    assert starts[0] < 10 and starts[-1] > 18000 and gaps.min() > 400 and gaps.max() < 1200
    assert found.held_bytes == sum(
        len(tokenizer.pieces[int(id)]) for row in found.held for id in row[1:]
    )


def test_several_texts_have_equal_shares(tokenizer):
    large, small = corpus("a", "alpha " * 50000), corpus("b", "omega " * 2000)
    found = gather([large, small], tokenizer, 16, 20)
    said = [spelled(tokenizer, row) for row in found.learned]
    assert sum("alpha" in text for text in said) == sum("omega" in text for text in said) == 10
    assert found.sources == ("a", "b")


def test_the_same_text_gives_the_same_and_another_another(tokenizer):
    one, two, other = (
        gather([corpus("n", numbered(n))], tokenizer, 32, 30) for n in (9000, 9000, 9001)
    )
    assert one.digest == two.digest != other.digest and len(one.digest) == 64
    assert np.array_equal(one.learned, two.learned) and np.array_equal(one.held, two.held)


def test_little_text_gives_fewer_windows_and_too_little_is_refused(tokenizer):
    few = gather([corpus("n", "x y z " * (WIDTH * 32))], tokenizer, 32, 60)
    assert 1 <= len(few.held) < len(few.learned) < 10
    for text in ("", "brief", "x" * (2 * WIDTH * 32 - 3)):
        with pytest.raises(DataError, match="n: too little text to calibrate by; 640 characters"):
            gather([corpus("n", text)], tokenizer, 32, 60)


def test_the_built_in_text_is_enough(tokenizer):
    corpora = [open_corpus(source, DataConfig()) for source in ("stdlib", "pydoc")]
    found = gather(corpora, tokenizer, 64, 12)
    assert 10 <= len(found.learned) <= 12 and 2 <= len(found.held) <= 3
