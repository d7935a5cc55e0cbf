"""Logs of answers: each is billed once, with its last usage; what is skipped is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError
from engine.text.answers import LeftOut, read_answers
from engine.text.usage import Usage, read_usage

START = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "model": "claude-x",
        "usage": {"input_tokens": 25, "cache_read_input_tokens": 7, "output_tokens": 1},
    },
}


def delta(output: int) -> dict:
    return {"type": "message_delta", "delta": {}, "usage": {"output_tokens": output}}


def chunk(usage=None, id="c1") -> dict:
    return {"id": id, "object": "chat.completion.chunk", "model": "gpt-x", "usage": usage}


def read(*values):
    left_out = LeftOut()
    placed = ((f"log:{number}", value) for number, value in enumerate(values, start=1))
    found = [read_usage(a.value, a.where) for a in read_answers(placed, left_out)]
    return found, left_out


def test_a_stream_of_anthropic_is_one_answer():
    """Regression: the beginning and the end of a message were billed as two."""
    events = [START, {"type": "ping"}, delta(9), delta(15), {"type": "message_stop"}]
    found, left_out = read(*events)
    assert found == [Usage(uncached=25, cache_read=7, output=15)]
    assert left_out == LeftOut(silent=2)
    found, left_out = read(START)
    assert found[0].output == 1 and left_out.unfinished == 1
    nameless = START | {"message": START["message"] | {"id": None}}
    assert len(read(nameless, delta(9), nameless, delta(9))[0]) == 2
    with pytest.raises(DataError, match="log:1: message_delta"):
        read(delta(9))


def test_a_stream_of_openai_is_one_answer():
    def usage(output):
        return {"prompt_tokens": 10, "completion_tokens": output, "total_tokens": 10 + output}

    found, left_out = read(chunk(), chunk(usage(1)), chunk(usage(2)), chunk(usage(5), id="c2"))
    assert found == [Usage(uncached=10, output=2), Usage(uncached=10, output=5)]
    assert left_out == LeftOut(silent=1, earlier=1)
    response = {"id": "r1", "model": "gpt-x", "usage": None}
    events = [
        {"type": "response.created", "response": response},
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.completed", "response": response | {"usage": usage(3)}},
    ]
    assert read(*events)[0] == [Usage(uncached=10, output=3)]
    bare = {"id": "c1", "choices": [{"delta": {"content": "x"}}], "usage": None}
    assert read(bare, chunk(usage(2)))[1] == LeftOut(silent=1)


def test_failed_lines_of_batches_are_named():
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    good = {"id": "b", "custom_id": "a", "response": {"status_code": 200, "body": {"usage": usage}}}
    found, left_out = read(
        good,
        good | {"custom_id": "z"},  # an id of the line is not one of the answer
        {"custom_id": "b", "response": None, "error": {"message": "expired"}},
        {"custom_id": "c", "response": {"status_code": 429, "body": {"error": {}}}},
        {"custom_id": "d\x1b", "result": {"type": "errored", "error": {}}},
    )
    assert len(found) == 2 and left_out.failed == ["log:3 b", "log:4 c", "log:5 d\\x1b"]
    assert list(left_out.lines()) == ["skipped: 3 that failed (log:3 b, log:4 c, log:5 d\\x1b)"]


KEYS = "type id usage message response result error choices custom_id input_tokens output_tokens"
KINDS = ["message_start", "message_delta", "ping", "response.created", "errored"]
JSON = st.recursive(
    st.none() | st.integers() | st.sampled_from(KINDS) | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from(KEYS.split()), inner) | st.lists(inner),
)


@given(st.lists(JSON, max_size=4))
def test_any_log_is_read_or_refused(values):
    """Property: nothing but usages or a DataError comes out."""
    try:
        found, left_out = read(*values)
    except DataError as error:
        assert str(error).startswith("log:")
    else:
        assert len(found) + left_out.silent + len(left_out.failed) <= len(values)


def test_answers_without_an_id_are_all_billed():
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    assert len(read(usage, usage, {"usage": usage})[0]) == 3
    assert len(read({"id": "x", "usage": usage}, {"id": "x", "usage": usage})[0]) == 1
    with pytest.raises(DataError, match="log:1: no usage"):
        read({"id": "x", "object": "chat.completion"})
