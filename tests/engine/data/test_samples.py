"""Samples: what becomes of rows that are too long, and that every count is exact."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.examples import Example
from engine.data.samples import CHATML, Tally, make_samples, with_template
from engine.errors import DataError, RecipeError
from engine.text.chat import find_answers, render
from engine.text.renderer import Renderer
from engine.text.settings import Settings
from engine.text.tokenizer import Tokenizer, load_tokenizer
from tests.engine.text.chats import TOOLS, ChatTokenizer, called, said
from tests.engine.text.conftest import NOW


def row(ids, mask, where="x:1"):
    return Example(where=where, kind="tokens", ids=tuple(ids), mask=tuple(map(bool, mask)))


def make(examples, tokenizer, overlong="error", limit=100, **options):
    """The samples and the tally."""
    tally = Tally()
    options = {"chat": "auto", "learn": "answers"} | options
    made = make_samples(
        examples, tokenizer, limit=limit, overlong=overlong, tally=tally, now=NOW, **options
    )
    return list(made), tally


def labels(samples):
    return [np.where(sample.learned, sample.ids, -100).tolist() for sample in samples]


NOTHING = {"dropped": 0, "split": 0, "cut": 0, "cut_tokens": 0}


@pytest.mark.parametrize(
    ("overlong", "found", "counted"),
    [
        ("drop", [[-100, 7, 8]], {"dropped": 1}),
        ("truncate", [[-100, 4, 5], [-100, 7, 8]], {"cut": 1, "cut_tokens": 2}),
    ],
)
def test_a_row_whose_answer_lies_beyond_the_limit(tokenizer, overlong, found, counted):
    """TRL cuts [1, 2, 3, 4, 5], mask [0, 0, 0, 1, 1], to 3 at its end and has to drop what is left.

    Here the prompt is cut, at its beginning, so the answer stays. Its second row, [6, 7, 8], is all
    labels there; here nothing is predicted for a first token.
    """
    rows = [row([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), row([6, 7, 8], [1, 1, 1])]
    samples, tally = make(rows, tokenizer, overlong, limit=3)
    assert labels(samples) == found
    assert {key: getattr(tally, key) for key in NOTHING} == NOTHING | counted
    assert tally.overlong == 1 and tally.rows == 2 and list(tally.lengths) == [5, 3]


@pytest.mark.parametrize(("answer", "cut"), [(1, 3), (2, 3), (3, None), (4, None)])
def test_an_answer_is_never_cut_off(tokenizer, answer, cut):
    """Limit 3: an answer of two leaves room for one token of its prompt, of three for none."""
    mask = [0] * (6 - answer) + [1] * answer
    samples, tally = make([row(range(6), mask)], tokenizer, "truncate", limit=3)
    if cut is None:
        assert (samples, tally.dropped, tally.cut) == ([], 1, 0)
    else:
        (sample,) = samples
        assert (sample.ids.tolist(), sample.cut, tally.cut_tokens) == ([3, 4, 5], 3, 3)
        assert sample.learned.sum() == answer


def test_both_answers_stay_when_the_prompt_is_cut(tokenizer):
    """The prompt is what comes before the first answer; of what lies between none is taken."""
    samples, tally = make(
        [row(range(10), [0] * 5 + [1, 1, 0, 1, 1])], tokenizer, "truncate", limit=7
    )
    assert labels(samples) == [[-100, -100, 5, 6, -100, 8, 9]] and tally.answers == 2
    samples, tally = make(
        [row(range(10), [0] * 5 + [1, 1, 0, 1, 1])], tokenizer, "truncate", limit=5
    )
    assert samples == [] and (tally.dropped, tally.answers) == (1, 0)


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 7, 100])
def test_a_text_is_split_so_that_each_token_is_learned_once(tokenizer, limit):
    example = Example(where="x:1", kind="text", text="abcdefgh")
    ids = [*tokenizer.encode("abcdefgh"), tokenizer.end_of_text]
    samples, tally = make([example], tokenizer, "split", limit=limit)
    assert [int(t) for s in samples for t in s.ids[s.learned]] == ids[1:]
    assert all(len(s.ids) <= limit and not s.learned[0] and s.learned[1:].all() for s in samples)
    whole = len(ids) <= limit
    count = len(samples)
    assert [s.part for s in samples] == (
        [""] if whole else [f"{n}/{count}" for n in range(1, count + 1)]
    )
    assert (tally.split, tally.answers, tally.stops) == (not whole, 1, 1)


def test_a_text_that_is_cut_keeps_its_beginning_and_loses_its_end(tokenizer):
    example = Example(where="x:1", kind="text", text="abcdefgh")
    (sample,), tally = make([example], tokenizer, "truncate", limit=4)
    assert sample.ids.tolist() == tokenizer.encode("abcdefgh")[:4]
    assert (tally.answers, tally.stops, tally.cut, sample.cut) == (1, 0, 1, tally.cut_tokens)


def test_what_begins_every_text_stays_when_a_prompt_is_cut(tokenizer):
    own = ChatTokenizer(tokenizer.inner, None, {}, "<s>", add_bos=True)
    example = Example(where="x:1", kind="prompt", prompt="abcdefgh", completion="xy")
    tail = [*own.encode("xy"), own.end_of_text]
    (sample,), _ = make([example], own, "truncate", limit=len(tail) + 3)
    assert sample.ids.tolist() == [own.bos, *own.encode("abcdefgh")[-2:], *tail]
    (sample,), _ = make([example], own, "truncate", limit=len(tail) + 1)
    assert sample.ids.tolist() == [own.bos, *tail] and sample.learned.tolist()[1:] == [True] * 3


def test_rows_that_are_too_long_are_named(tokenizer):
    rows = [row(range(n), [0] * (n - 1) + [1], f"x.jsonl:{n}") for n in range(2, 12)]
    with pytest.raises(DataError) as caught:
        make(rows, tokenizer, "error", limit=4)
    message = str(caught.value)
    assert message.startswith("7 rows are longer than data.seq_len=4: x.jsonl:5 (5 tokens), ")
    assert "x.jsonl:9 (9 tokens), … and 2 more" in message and "x.jsonl:10" not in message
    assert message.endswith("; raise it or set data.overlong=drop, truncate or split")
    with pytest.raises(DataError, match="drop or truncate; split is for text"):
        make(rows, tokenizer, "split", limit=4)


def test_all_rows_are_read_before_the_first_wrong_ones_are_named(tokenizer):
    rows = [row([1, 2], [0, n % 2], f"x.jsonl:{n}") for n in range(1, 20)]
    with pytest.raises(DataError) as caught:
        make(rows, tokenizer)
    problems = caught.value.args[0].splitlines()
    assert [line.split(": ")[0] for line in problems[:5]] == [
        f"x.jsonl:{n}" for n in (2, 4, 6, 8, 10)
    ]
    assert problems[5:] == ["… and 4 more"]
    assert "nothing in it is to be learned" in problems[0]


def test_a_long_prompt_and_a_short_limit_never_leave_a_sample_without_a_target(tokenizer):
    """Elsewhere such rows train on nothing, at loss 0 or NaN."""
    example = Example(where="x.jsonl:7", kind="prompt", prompt="abcd" * 99, completion="yes")
    for overlong in ("truncate", "drop"):
        samples, _ = make([example], tokenizer, overlong, limit=16)
        assert all(sample.learned.any() for sample in samples)
    with pytest.raises(DataError, match=r"x\.jsonl:7 \(\d+ tokens\)"):
        make([example], tokenizer, "error", limit=16)


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=2, max_size=12), max_size=8),
    limit=st.integers(2, 12),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_any_lengths_and_limits(tokenizer, masks, limit, overlong):
    """Every sample fits and has a target, every row is accounted for, every count adds up."""
    rows = [row(range(len(mask)), [*mask[:-1], True]) for mask in masks]
    samples, tally = make(rows, tokenizer, overlong, limit)
    assert all(len(s.ids) <= limit and s.learned.any() and not s.learned[0] for s in samples)
    assert tally.rows == len(rows) == len(samples) + tally.dropped
    assert tally.samples == len(samples) and tally.overlong == tally.dropped + tally.cut
    assert tally.tokens == sum(len(s.ids) for s in samples)
    assert tally.learned == sum(int(s.learned.sum()) for s in samples)
    assert tally.cut_tokens == sum(s.cut for s in samples)
    assert list(tally.lengths) == [len(mask) for mask in masks]


def test_ends_are_counted_where_generation_would_stop(tokenizer):
    """A template that ends its turns with a token that the checkpoint does not stop at: 0 of 2."""
    talk = Example(where="x:1", kind="messages", messages=tuple(said("a", "b", "c", "<|im_end|>")))
    deaf = ChatTokenizer(tokenizer.inner, CHATML)
    for own, stops in ((with_template(tokenizer), 2), (deaf, 0)):
        _, tally = make([talk], own)
        assert (tally.answers, tally.stops, tally.lookalikes) == (2, stops, 1)


def test_padding_is_told_by_place_and_an_end_that_pads_too_is_learned(tokenizer):
    """Pad = end of turn, as SmolLM2 has it: there is no padding here, so its label stays."""
    raw = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    own = Tokenizer(tokenizer.inner, Settings(raw=raw, template=CHATML))
    talk = Example(where="x:1", kind="messages", messages=tuple(said("a", "b")))
    (sample,), tally = make([talk], own)
    assert (tally.answers, tally.stops) == (1, 1)
    assert own.decode(sample.ids[sample.learned]) == "b<|im_end|>"


def test_chatml_for_tokenizers_that_have_its_tokens(tokenizer):
    own = with_template(tokenizer)
    text = render([{"role": "system", "content": "s"}, *said("a")], own, now=NOW).text
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    rendered, (answer,) = find_answers(said("a", "b"), own, now=NOW)
    assert own.decode(rendered.ids[answer.start : answer.stop]) == "b<|im_end|>"
    assert own.end_of_text == tokenizer.end_of_text
    assert own.ends == tokenizer.ends | {tokenizer.inner.token_to_id("<|im_end|>")}
    assert with_template(own) is own
    bare = Tokenizer(type(tokenizer.inner).from_str(tokenizer.inner.to_str()))
    bare.special = {0: "<|endoftext|>"}
    assert with_template(bare) is bare


def test_the_built_in_template_refuses_what_it_would_leave_out(tokenizer):
    own = with_template(tokenizer)
    talk = {"kind": "messages", "messages": tuple(called({"place": "Kiel"}))}
    with pytest.raises(DataError, match="knows no tool calls"):
        make([Example(where="x:1", **talk)], own)
    talk["messages"] = tuple(said("a", "b"))
    with pytest.raises(DataError, match="knows no tools"):
        make([Example(where="x:1", tools=tuple(TOOLS), **talk)], own)


def test_a_tokenizer_with_the_template_is_the_same_when_it_is_loaded_again(tokenizer, tmp_path):
    own = with_template(tokenizer)
    own.save(tmp_path, 128)
    again = load_tokenizer(tmp_path)
    assert (again.template, again.digest) == (CHATML, tokenizer.digest)


def test_a_limit_of_one_leaves_nothing_to_predict(tokenizer):
    with pytest.raises(RecipeError, match="data.seq_len=1 leaves nothing to predict"):
        make([], tokenizer, limit=1)


def test_a_given_renderer_is_used_and_left_running(tokenizer):
    talk = Example(where="x:1", kind="messages", messages=tuple(said("a", "b")))
    with Renderer() as renderer:
        process = renderer._process
        make([talk], with_template(tokenizer), renderer=renderer)
        assert renderer._process is process and process.poll() is None
