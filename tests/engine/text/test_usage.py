"""Usage objects as OpenAI and Anthropic send them, and the sum that must hold for all of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError
from engine.text.usage import Usage, read_usage

COUNT = st.integers(0, 10**7)

CHAT = {
    "prompt_tokens": 2006,
    "completion_tokens": 300,
    "total_tokens": 2306,
    "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 128, "rejected_prediction_tokens": 0},
}
RESPONSES = {
    "input_tokens": 2006,
    "input_tokens_details": {"cached_tokens": 1920},
    "output_tokens": 300,
    "output_tokens_details": {"reasoning_tokens": 128},
    "total_tokens": 2306,
}
ANTHROPIC = {
    "input_tokens": 50,
    "cache_creation_input_tokens": 248,
    "cache_read_input_tokens": 1800,
    "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
    "output_tokens": 503,
    "server_tool_use": {"web_search_requests": 0},
    "service_tier": "standard",
}


@pytest.mark.parametrize("shape", [CHAT, RESPONSES], ids=["chat", "responses"])
def test_what_openai_cached_is_inside_the_input(shape):
    assert read_usage(shape) == Usage(uncached=86, cache_read=1920, output=300, reasoning=128)
    assert read_usage(shape).input == 2006


def test_what_anthropic_cached_lies_beside_the_input():
    usage = read_usage(ANTHROPIC)
    assert usage == Usage(50, 1800, 248, 503, 0, cache_write_1h=100)
    assert usage.input == 2098
    assert usage.notes == ()


def test_the_same_numbers_mean_different_things_in_the_two_shapes():
    """The control: reading one shape by the rule of the other changes the input."""
    openai = {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 60}}
    anthropic = {"input_tokens": 100, "cache_read_input_tokens": 60}
    openai["output_tokens"] = anthropic["output_tokens"] = 0
    assert read_usage(openai).input == 100
    assert read_usage(anthropic).input == 160


@pytest.mark.parametrize(
    "wrap",
    [
        lambda usage: {"id": "x", "model": "m", "usage": usage},
        lambda usage: json.dumps({"usage": usage}),
        lambda usage: json.dumps({"usage": usage}).encode() + b"\n",
        lambda usage: {"type": "response.completed", "response": {"usage": usage}},
        lambda usage: {"type": "message_start", "message": {"usage": usage}},
        lambda usage: {"custom_id": "a", "response": {"body": {"usage": usage}}, "error": None},
        lambda usage: {"result": {"type": "succeeded", "message": {"usage": usage}}},
    ],
)
@pytest.mark.parametrize("usage", [CHAT, RESPONSES, ANTHROPIC])
def test_found_inside_whole_responses(wrap, usage):
    assert read_usage(wrap(usage)) == read_usage(usage)


@given(uncached=COUNT, read=COUNT, write=COUNT, output=COUNT, data=st.data())
def test_no_shape_bills_a_cached_token_twice(uncached, read, write, output, data):
    """Property: all shapes of one request become one usage, whose parts add up to its input."""
    reasoning = data.draw(st.integers(0, output))
    whole = uncached + read + write
    details = {"cached_tokens": read, "cache_write_tokens": write}
    chat = {
        "prompt_tokens": whole,
        "prompt_tokens_details": details,
        "completion_tokens": output,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": whole + output,
    }
    responses = {
        "input_tokens": whole,
        "input_tokens_details": details,
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": reasoning},
    }
    beside = {
        "input_tokens": uncached,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": write,
        "output_tokens": output,
        "output_tokens_details": {"thinking_tokens": reasoning},
    }
    expected = Usage(uncached, read, write, output, reasoning)
    for shape in (chat, responses, beside):
        usage = read_usage(shape)
        assert usage == expected
        assert usage.input == usage.uncached + usage.cache_read + usage.cache_write == whole


def test_a_proxy_may_repeat_a_number_but_not_contradict_it():
    repeated = CHAT | {"cache_read_input_tokens": 1920, "input_tokens": 2006, "output_tokens": 300}
    assert read_usage(repeated) == read_usage(CHAT)
    for change in ({"cache_read_input_tokens": 7}, {"input_tokens": 86}, {"output_tokens": 1}):
        with pytest.raises(DataError):
            read_usage(CHAT | change)


def test_a_cache_that_could_be_inside_or_beside_is_refused():
    with pytest.raises(DataError, match="counted twice"):
        read_usage({"prompt_tokens": 100, "completion_tokens": 1, "cache_read_input_tokens": 60})


def test_deepseek_names_hits():
    usage = {"prompt_tokens": 9, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 5}
    usage["total_tokens"] = 9
    assert read_usage(usage) == Usage(uncached=5, cache_read=4)
    with pytest.raises(DataError, match="misses"):
        read_usage(usage | {"prompt_cache_miss_tokens": 6})


def test_langchain_counts_inside_under_shorter_names():
    usage = {
        "input_tokens": 350,
        "output_tokens": 240,
        "total_tokens": 590,
        "input_token_details": {"audio": 0, "cache_creation": 200, "cache_read": 100},
        "output_token_details": {"reasoning": 200},
    }
    assert read_usage({"usage_metadata": usage}) == Usage(50, 100, 200, 240, 200)


def test_reasoning_beside_the_output_is_known_by_the_total():
    """Regression of others: x.ai counts reasoning beside its output; both are billed as output."""
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "completion_tokens_details": {"reasoning_tokens": 100},
        "total_tokens": 115,
    }
    assert read_usage(usage) == Usage(uncached=10, output=105, reasoning=100)
    with pytest.raises(DataError, match="reasoning"):
        read_usage(usage | {"total_tokens": 15})


def test_what_is_not_text_at_the_standard_rate_is_named():
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 0,
        "prompt_tokens_details": {"audio_tokens": 4},
        "server_tool_use": {"web_search_requests": 3},
    }
    assert [note.split()[0] for note in read_usage(usage).notes] == ["4", "3"]


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_how_a_request_was_served_is_read(place):
    """Regression: OpenAI says it beside the usage, and it was overlooked there."""

    def served(word):
        if place == "inside":
            return read_usage(CHAT | {"service_tier": word}).served
        return read_usage({"service_tier": word, "usage": CHAT}).served

    assert [served(word) for word in ("flex", "batch", "default", "auto", None)] == [
        "flex",
        "batch",
        "",
        "",
        "",
    ]
    with pytest.raises(DataError, match="service_tier"):
        served(3)


def test_what_is_missing_is_not_nought():
    """Regression: a count that was null or not there was billed as 0."""
    for usage in (
        {"prompt_tokens": 5},
        {"prompt_tokens": 5, "completion_tokens": None},
        {"prompt_tokens": None, "completion_tokens": 5},
        {"input_tokens": None, "output_tokens": 5, "cache_read_input_tokens": 3},
    ):
        with pytest.raises(DataError, match=r"log:3: .*missing or null"):
            read_usage(usage, "log:3")
    embedding = {"prompt_tokens": 8, "total_tokens": 8}
    assert read_usage(embedding) == Usage(uncached=8), "the control: its total says that is all"


def test_keys_that_stand_twice_are_refused():
    with pytest.raises(DataError, match="'prompt_tokens' stands twice"):
        read_usage('{"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens": 9}')


def test_cache_writes_by_their_life_alone_lie_beside_the_input():
    lives = {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 10}
    usage = read_usage({"input_tokens": 5, "cache_creation": lives, "output_tokens": 1})
    assert usage == Usage(uncached=5, cache_write=40, cache_write_1h=10, output=1)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"tokens": 3, "cost": 1}, "'cost', 'tokens'"),
        ({"usage": None, "id": 1}, "'id', 'usage'"),
        ({"usage": {"output_tokens": 3}}, "output_tokens"),
        ({"a\n\x1bb": 1}, r"'a\n\x1bb'"),
        ({}, "no keys"),
        ([], "list"),
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("7", "int"),
        ({"prompt_tokens": -1}, "prompt_tokens=-1"),
        ({"prompt_tokens": True}, "prompt_tokens=True"),
        ({"prompt_tokens": 1.5}, "prompt_tokens=1.5"),
        ({"prompt_tokens": "12"}, "prompt_tokens='12'"),
        ({"prompt_tokens": 10**30}, "10^15"),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 6}}, "exceed"),
        ({"prompt_tokens": 5, "prompt_tokens_details": [1]}, "must be an object"),
        ({"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 11}, "total_tokens"),
        (ANTHROPIC | {"cache_creation_input_tokens": 9}, "contradict"),
        (ANTHROPIC | {"cache_creation": {"ephemeral_5m_input_tokens": "x"}}, "ephemeral_5m"),
    ],
    ids=str,
)
def test_refused_in_one_line_with_its_place(found, says):
    with pytest.raises(DataError) as refused:
        read_usage(found, "log.jsonl:3")
    assert str(refused.value).startswith("log.jsonl:3: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_object_that_holds_itself_ends():
    loop: dict = {}
    loop["usage"] = loop
    with pytest.raises(DataError):
        read_usage(loop)


@pytest.mark.parametrize(
    "parts",
    [
        {"uncached": -1},
        {"output": 1.0},
        {"output": 3, "reasoning": 4},
        {"cache_write": 1, "cache_write_1h": 2},
    ],
    ids=str,
)
def test_an_impossible_usage_cannot_be_made(parts):
    with pytest.raises(DataError):
        Usage(**parts)


KEYS = (
    "usage body prompt_tokens input_tokens output_tokens total_tokens prompt_tokens_details"
    " cached_tokens cache_creation server_tool_use"
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.sampled_from(KEYS.split()), inner),
)


@given(JSON)
def test_anything_is_read_or_refused(found):
    """Property: nothing else than a usage or a DataError comes out."""
    try:
        usage = read_usage(found)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert usage.input >= 0 <= usage.output
