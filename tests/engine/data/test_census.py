"""The figures of `lm data check`, counted by hand."""

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.census import Passing, explain, measure, take_census
from engine.data.examples import Example
from engine.data.samples import Sample, Tally, make_samples, with_template
from tests.engine.text.chats import said


def text(words, where="x:1"):
    return Example(where=where, kind="text", text=words)


def census(examples, tokenizer, others=frozenset(), limit=100, overlong="drop"):
    passed, tally = Passing(examples, others), Tally()
    options = {"chat": "auto", "learn": "answers", "limit": limit, "overlong": overlong}
    samples = list(make_samples(passed, tokenizer, tally=tally, **options))
    return take_census(passed, tally), passed.digests, samples


def test_figures_worked_by_hand(tokenizer):
    """A letter that merges with none is a token; a text of n has n + 1, and learns n."""
    rows = [text("~"), text("~^", "x:2"), text("~", "x:3"), text("~^" * 5, "x:4")]
    rows += [Example(where="x:5", kind="prompt", prompt="~", completion="<|im_end|>")]
    assert len(tokenizer.encode("~^" * 5)) == 10
    end = len(tokenizer.encode("<|im_end|>"))
    found, digests, samples = census(rows, tokenizer, limit=end + 2)
    assert found.kinds == {"text": 4, "prompt": 1}
    assert (found.rows, found.duplicates, found.shared, len(digests)) == (5, 1, 0, 4)
    overlong = end + 2 < 11
    assert (found.overlong, found.dropped, found.samples) == (overlong, overlong, 5 - overlong)
    assert found.tokens == 2 + 3 + 2 + (0 if overlong else 11) + (2 + end)
    assert found.learned == 1 + 2 + 1 + (0 if overlong else 10) + (1 + end)
    assert (found.answers, found.stops, found.lookalikes) == (len(samples), len(samples), 1)
    assert found.lengths is not None and found.lengths.most == max(11, end + 2)


def test_rows_of_both_sides_are_found_wherever_they_stand(tokenizer):
    _, train, _ = census([text("a"), text("b")], tokenizer)
    valid = [text("b", "valid:9"), text("c", "valid:8"), text("b", "valid:7")]
    found, _, _ = census(valid, tokenizer, others=train)
    assert (found.shared, found.duplicates) == (2, 1)
    talk = Example(where="x:1", kind="messages", messages=tuple(said("b", "c")))
    assert census([talk], with_template(tokenizer), others=train)[0].shared == 0


def test_no_rows_have_no_lengths(tokenizer):
    found, _, samples = census([], tokenizer)
    assert (found.rows, found.lengths, found.kinds, samples) == (0, None, {}, [])


@pytest.mark.parametrize(
    ("lengths", "median", "p90", "p99"),
    [([7], 7, 7, 7), (range(1, 11), 5, 9, 10), (range(1, 101), 50, 90, 99), ([1, 1, 9], 1, 9, 9)],
)
def test_percentiles_by_nearest_rank(lengths, median, p90, p99):
    found = measure(array("I", lengths))
    assert found is not None
    assert (found.median, found.p90, found.p99) == (median, p90, p99)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_the_histogram_holds_every_row_once(lengths):
    found = measure(array("I", lengths))
    assert found is not None
    assert (found.least, found.most) == (min(lengths), max(lengths))
    assert found.mean == pytest.approx(sum(lengths) / len(lengths))
    assert 1 <= len(found.bars) <= 10
    for bar in found.bars:
        assert bar.rows == sum(bar.low <= length <= bar.high for length in lengths)
    assert sum(bar.rows for bar in found.bars) == len(lengths)


def test_a_sample_explained(tokenizer):
    own = with_template(tokenizer)
    talk = Example(where="x:1", kind="messages", messages=tuple(said("é<|im_end|>", "日本")))
    _, _, (sample,) = census([talk], own)
    pieces = explain(sample, own)
    assert [piece.id for piece in pieces] == sample.ids.tolist()
    assert [piece.learned for piece in pieces] == sample.learned.tolist()
    assert "".join(piece.text for piece in pieces) == own.decode(sample.ids)
    assert "".join(p.text for p in pieces if p.learned) == "日本<|im_end|>"
    controls = [piece.text for piece in pieces if piece.control]
    assert controls == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


def test_half_a_character_at_the_end_is_shown(tokenizer):
    ids = np.array(tokenizer.encode("日")[:2], np.int32)
    sample = Sample(where="x:1", ids=ids, learned=np.array([False, True]))
    assert "".join(piece.text for piece in explain(sample, tokenizer)) == "\ufffd"
