"""Greedy answers: the same as one by one, counted right, with intervals that are Wilson's."""

import pytest
import torch

from engine.config import SampleConfig
from engine.errors import LimitError
from engine.finetune.answers import Answer, Question, answer, tally, usual_answers, wilson
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from tests.conftest import TEXT, make_model

GREEDY = SampleConfig(temperature=0, max_tokens=20)


def questions(tokenizer, size=12):
    """Prompts of few different lengths, so that several share a batch."""
    ids = tokenizer.encode(TEXT)
    return [
        Question(task="t", ids=ids[7 * k : 7 * k + 5 + k % 3], expected="x") for k in range(size)
    ]


def eager_to_end(tokenizer):
    """A model that says its end token now and then, as a tuned one does."""
    model = make_model(3)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.end_of_text] *= 1.5
    return model


def one_by_one(model, tokenizer, question):
    decoder = TorchDecoder(model)
    start = prefill(decoder, list(question.ids), decoder.cache(128))
    tokens = list(generate(decoder, tokenizer, start, GREEDY, seed=0))
    return "".join(token.text for token in tokens), tokens[-1].finish_reason == "end"


def test_answers_in_batches_are_those_of_generate_one_by_one(tokenizer):
    model, asked = eager_to_end(tokenizer), questions(tokenizer)
    given = list(answer(model, tokenizer, asked, most=20))
    assert sorted(id(one.question) for one in given) == sorted(id(one) for one in asked)
    expected = [one_by_one(model, tokenizer, one.question) for one in given]
    assert [(one.text, one.ended) for one in given] == expected
    assert {one.ended for one in given} == {True, False}  # both kinds were compared


def test_a_prompt_without_room_for_an_answer_is_refused(tokenizer):
    long = Question(task="t", ids=[5] * 120, expected="x")
    with pytest.raises(LimitError, match="120"):
        list(answer(make_model(), tokenizer, [long], most=20))


def given(task, text, expected, ended=True):
    return Answer(question=Question(task=task, ids=[1], expected=expected), text=text, ended=ended)


def test_right_is_the_whole_text_and_an_end():
    assert given("a", " self, x", "self, x").right
    assert not given("a", "self, x, y", "self, x").right
    assert not given("a", "self, X", "self, x").right
    assert not given("a", "self, x", "self, x", ended=False).right


def test_tally_counts_per_task_and_in_all():
    answers = [
        given("b", "yes", "yes"),
        given("b", "yes", "no"),
        given("a", "x", "x", ended=False),
        given("b", "no", "no"),
    ]
    found = tally(answers, {"a": "x", "b": "no"})
    figures = [(one.task, one.n, one.right, one.usual, one.ended) for one in found]
    assert figures == [("a", 1, 0, 1, 0), ("b", 3, 2, 2, 3), ("all", 4, 2, 3, 3)]
    assert found[-1].share == 0.5
    assert tally([], {}) == []


def test_the_usual_answer_is_the_most_frequent_and_then_the_first():
    rows = [("a", " y"), ("a", "y"), ("a", "x"), ("b", "2"), ("b", "1")]
    rows = [{"task": task, "completion": text} for task, text in rows]
    assert usual_answers(rows) == {"a": "y", "b": "1"}


# R: prop.test(right, n, correct=FALSE)$conf.int, and by hand for the ends.
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(15, 50, 0.1910, 0.4375), (81, 263, 0.2553, 0.3662), (0, 10, 0.0, 0.2775), (1, 1, 0.2065, 1)],
)
def test_wilson(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
