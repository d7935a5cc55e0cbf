"""Requests of every published shape: nothing with words in it is ever dropped in silence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError
from engine.text.frames import count_parts
from engine.text.request import holds_words, read_request

HI = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": "Oslo"}}}


def words(text: str) -> int:
    return len(text.split())


def parts(value, frame=(3, 1, 3)):
    return count_parts(read_request(value, "r:1"), "gpt-4o", words, exact=True, frame=frame)


def tokens(value) -> int:
    return sum(part.tokens or 0 for part in parts(value))


@pytest.mark.parametrize(
    "more",
    [
        {"system": "be very brief"},
        {"system": [{"type": "text", "text": "be very brief", "cache_control": {"type": "x"}}]},
        {"system": [{"text": "be very brief"}]},
        {"instructions": "be very brief"},
        {"tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}]},
        {"functions": [{"name": "f", "parameters": SCHEMA}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ],
    ids=str,
)
def test_every_part_of_a_request_is_counted(more):
    """Regression: all of these used to count as nothing, and nothing was said."""
    assert tokens({"messages": [HI], **more}) > tokens({"messages": [HI]})


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": "I will not"},
        {"reasoning_content": "let me think"},
        {"thinking": "let me think"},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"content": [{"type": "thinking", "thinking": "let me think"}]},
        {"content": [{"type": "refusal", "refusal": "I will not"}]},
        {"content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": "b c"}}]},
        {"content": [{"type": "tool_result", "tool_use_id": "1", "content": "a b c"}]},
        {"content": [{"type": "document", "source": {"type": "text", "data": "a b c"}}]},
    ],
    ids=str,
)
def test_every_part_of_a_message_is_counted(more):
    empty = {"role": "assistant", "content": ""}
    assert tokens([empty | more]) > tokens([empty])


def test_keys_that_nobody_knows_are_named():
    """Regression: {"contnt": "hi"} counted 7 and ended well."""
    typo = {"role": "user", "contnt": "hi"}
    assert read_request([typo], "r:1").unread == ('"contnt"',)
    assert ('"contnt"', None) in [(part.kind, part.tokens) for part in parts([typo])]
    assert read_request({"messages": [HI], "sytem": "x"}, "r:1").unread == ('"sytem"',)
    assert read_request({"messages": [HI], "text": "x"}, "r:1").unread == ('"text"',)
    piece = {"type": "text", "text": "hi", "txt": "more"}
    assert read_request([{"role": "user", "content": [piece]}], "r:1").unread == ('"txt"',)
    result = {"type": "tool_result", "content": {"a": "words"}}
    assert None in [part.tokens for part in parts([{"role": "user", "content": [result]}])]
    # The control: settings hold no words for the model, nor do numbers and empty texts.
    quiet = {"temperature": 1, "stop": ["a"], "metadata": {"a": "b"}, "annotations": [], "new": ""}
    assert read_request({"messages": [HI | {"weight": 1}], **quiet}, "r:1").unread == ()


def test_tools_of_the_provider_and_strange_pieces_are_unknown():
    for value in (
        {"messages": [HI], "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    ):
        assert any(part.tokens is None for part in parts(value)), value


def test_the_responses_shape_and_lines_of_batches():
    chat = {"messages": [{"role": "system", "content": "be brief"}, HI], "model": "gpt-4o"}
    response = {"instructions": "be brief", "input": "hi", "model": "gpt-4o"}
    anthropic = {"system": "be brief", "messages": [HI], "model": "gpt-4o"}
    items = {"instructions": "be brief", "input": [{"type": "message", **HI}], "model": "gpt-4o"}
    for shape in (chat, response, anthropic, items):
        for line in (shape, {"custom_id": "1", "body": shape}, {"custom_id": "1", "params": shape}):
            assert tokens(line) == tokens(chat) and read_request(line, "r:1").model == "gpt-4o"
    calls = [
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
        {"type": "function_call_output", "call_id": "1", "output": "four words are here"},
    ]
    assert tokens({"input": calls}) == 3 + (3 + 1 + 1) + (3 + 1 + 4)


@pytest.mark.parametrize(
    "schema",
    [
        lambda text: {"$defs": {"x": {"description": text}}},
        lambda text: {"oneOf": [{"description": text}]},
        lambda text: {"properties": {"a": {"type": "string", "default": text}}},
        lambda text: {"description": text},
        lambda text: {"anyOf": [{"properties": {"b": {}}, "description": text}]},
        lambda text: {"properties": {"a": {"type": "string", "description": text}}},  # known
    ],
)
def test_every_word_of_a_schema_counts(schema):
    """Regression: what TypeScript has no place for was left out."""

    def tool(text):
        function = {"name": "f", "parameters": {"type": "object", **schema(text)}}
        return {"messages": [HI], "tools": [{"type": "function", "function": function}]}

    assert tokens(tool("five words are in here")) == tokens(tool("one")) + 4


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([HI | {"tool_calls": 5}], "message 1"),
        ({"messages": [HI], "tools": 5}, '"tools" is not a list'),
        ({"messages": [HI], "functions": [5]}, '"functions" is not a list'),
        ({"messages": [HI], "system": 5}, "system"),
        ({"input": 5}, '"input"'),
        ({"input": "x", "messages": [HI]}, "keep one"),
        ({"body": 5}, "list of messages"),
        ({"prompt": "x"}, "messages"),
        ([], "no messages"),
        (5, "list of messages"),
    ],
    ids=str,
)
def test_what_is_no_request_is_refused(value, says):
    with pytest.raises(DataError, match="^r:1") as refused:
        read_request(value, "r:1")
    assert says in str(refused.value)


def test_words_are_found_at_any_depth():
    deep: list = ["x"]
    for _ in range(100_000):
        deep = [deep]
    assert holds_words(deep) and not holds_words([[{"a": ["", 3, None]}]])


KEYS = "messages role content system tools function parameters input type text tool_calls source"
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.sampled_from(KEYS.split()),
    lambda inner: st.dictionaries(st.sampled_from(KEYS.split()), inner) | st.lists(inner),
)


@given(JSON, st.dictionaries(st.sampled_from(KEYS.split()), JSON))
def test_anything_is_counted_or_refused(value, message):
    """Property: nothing but parts or a DataError comes out."""
    for one in (value, {"messages": value}, [{"role": "user", **message}], {"input": value}):
        try:
            assert all((part.tokens or 0) >= 0 for part in parts(one))
        except DataError as error:
            assert str(error).startswith("r:1")
