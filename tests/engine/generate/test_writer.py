"""What is shown of an answer is the text of its ids, cut off where it ends, however ids cut it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generate.writer import Token, Writer
from tests.conftest import TEXT


def written(writer: Writer, ids: list[int]) -> list[Token]:
    """Write ids until the answer ends."""
    made = []
    for index, token_id in enumerate(ids):
        made.append(writer.write(token_id, time=float(index)))
        if made[-1].finish_reason:
            break
    return made


def spelled(tokenizer, text: str) -> list[int]:
    """One token a byte, so that every text has many cuts."""
    return [tokenizer.byte_ids[byte] for byte in text.encode()]


@pytest.mark.parametrize(
    "text, stops, most, shown, reason",
    [
        ("abcdef", [], 9, ["a", "b", "c", "d", "e", "f"], None),
        ("abcdef", [], 3, ["a", "b", "c"], "length"),
        ("abcdef", ["cd"], 9, ["a", "b", "", ""], "stop"),
        ("abcdef", ["cd"], 4, ["a", "b", "", ""], "stop"),  # both at once: the string is not shown
        ("abcdef", ["cdX"], 4, ["a", "b", "", "cd"], "length"),
        ("abcdef", ["cdX"], 9, ["a", "b", "", "", "cde", "f"], None),
        ("a😀b", [], 9, ["a", "", "", "", "😀", "b"], None),
        ("a😀b", [], 3, ["a", "", "\ufffd"], "length"),
        ("a😀b", ["\ufffd"], 3, ["a", "", ""], "stop"),
        ("a", [], 1, ["a"], "length"),
    ],
    ids=str,
)
def test_by_hand(text, stops, most, shown, reason, tokenizer):
    made = written(Writer(tokenizer, stops, most, tokenizer.ends), spelled(tokenizer, text))
    assert [token.text for token in made] == shown
    assert [token.finish_reason for token in made] == [None] * (len(made) - 1) + [reason]


def test_an_end_has_no_text_and_brings_what_was_held_back(tokenizer):
    end = tokenizer.end_of_text
    ids = [*spelled(tokenizer, "ab"), end]
    made = written(Writer(tokenizer, ["bX"], 9, {end}), ids)
    assert [token.text for token in made] == ["a", "", "b"]
    assert made[-1].finish_reason == "end"
    # Also where it is the last that fits; and with no ends it is a token like any other.
    assert written(Writer(tokenizer, [], 3, {end}), ids)[-1].finish_reason == "end"
    made = written(Writer(tokenizer, [], 9, ()), ids)
    assert (made[-1].text, made[-1].finish_reason) == ("<|endoftext|>", None)


def test_what_is_known_of_a_token_is_passed_on(tokenizer):
    writer = Writer(tokenizer, [], 2, ())
    (first,) = spelled(tokenizer, "a")
    assert writer.write(first, time=1.5, logprob=-0.5, top=[(3, -0.1)]) == Token(
        id=first, text="a", logprob=-0.5, top=[(3, -0.1)], time=1.5, finish_reason=None
    )
    assert writer.left == 1
    assert writer.write(first, time=2.0).logprob is None


@given(
    start=st.integers(0, len(TEXT) - 60),
    length=st.integers(1, 40),
    size=st.integers(2, 4),
    bytewise=st.booleans(),
)
def test_the_cuts_between_tokens_change_nothing(start, length, size, bytewise, tokenizer):
    """Up to the first stop string the text is shown, whole, by whatever ids it is made of."""
    text, stop = TEXT[start : start + length], TEXT[start + length // 2 :][:size]
    ids = spelled(tokenizer, text) if bytewise else tokenizer.encode(text)
    shown = "".join(t.text for t in written(Writer(tokenizer, [stop], len(ids), ()), ids))
    assert shown == text.split(stop)[0]
