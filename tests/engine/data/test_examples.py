"""What a row of each format means, spelled out."""

import json
from collections import Counter
from datetime import datetime
from decimal import Decimal
from random import Random

import pytest

from engine.data.examples import CONVERT, Example
from engine.data.formats import examples
from engine.data.rows import made_rows
from engine.errors import DataError
from engine.text.chat import check_messages
from tests.engine.data.malformed import ANSWER, SHARE, USER

SYSTEM = {"role": "system", "content": "be brief"}


def one(format, **row):
    """The example of a row; conversations are found under "messages" by now."""
    return CONVERT[format](row, "a:1")


def test_text_and_prompts_are_what_they_are():
    assert one("text", text=" a\n") == Example(where="a:1", kind="text", text=" a\n")
    expected = Example(where="a:1", kind="prompt", prompt="a ", completion=" b")
    assert one("prompt", prompt="a ", completion=" b", id=7) == expected


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"instruction": "add", "input": "1, 2"}, "add\n\n1, 2"),
        ({"instruction": "add", "input": ""}, "add"),
        ({"instruction": "add", "input": None, "system": "", "history": []}, "add"),
        ({"instruction": "", "input": "1, 2"}, "1, 2"),
    ],
)
def test_alpaca_is_a_prompt(row, prompt):
    example = one("alpaca", output="3", **row)
    assert (example.kind, example.prompt, example.completion) == ("prompt", prompt, "3")


def test_alpaca_with_a_system_text_or_a_history_is_messages():
    example = one(
        "alpaca", instruction="c", input="d", output="e", system="s", history=[["a", "b"]]
    )
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c\n\nd"),
        ("assistant", "e"),
    ]
    assert example.learned == (None,) * 5


def test_a_completion_of_messages_is_learned_and_answers_in_its_prompt_are_not():
    example = one("prompt", prompt=[USER, ANSWER, USER], completion=[ANSWER])
    assert example.messages == (USER, ANSWER, USER, ANSWER)
    assert example.learned == (None, False, None, None)
    said = one("prompt", prompt=[USER, ANSWER | {"train": True}, USER], completion=[ANSWER])
    assert said.learned == (None, True, None, None)
    assert one("prompt", prompt="hi", completion=[ANSWER]).messages == (USER, ANSWER)
    assert one("prompt", prompt=[USER], completion="hello").messages == (USER, ANSWER)
    with pytest.raises(DataError, match="nothing to learn"):
        one("prompt", prompt=[USER, ANSWER], completion=[USER])


@pytest.mark.parametrize(
    "marks, learned",
    [
        ({}, None),
        ({"train": None, "weight": None}, None),
        ({"train": True}, True),
        ({"weight": 1}, True),
        ({"weight": 1.0, "train": True}, True),
        ({"weight": 0}, False),
        ({"train": False}, False),
        ({"content": [{"type": "text", "text": "hello", "train": False}]}, False),
        ({"content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}, None),
    ],
)
def test_a_message_says_whether_it_is_learned(marks, learned):
    """The marks are gone from the message, and parts of its content are one text."""
    example = one("messages", messages=[USER, ANSWER | marks, USER, ANSWER])
    assert example.learned == (None, learned, None, None)
    assert example.messages == (USER, ANSWER, USER, ANSWER)


def test_parts_of_one_message_are_learned_alike():
    parts = [{"type": "text", "text": "a", "train": True}, {"type": "text", "text": "b"}]
    with pytest.raises(DataError, match="a:1: message 2 is to be learned and is not"):
        one("messages", messages=[USER, ANSWER | {"content": parts}])


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_a_list_or_its_json(tools):
    assert one("messages", messages=[USER, ANSWER], tools=tools).tools == tuple(TOOLS)
    for none in (None, "", []):
        assert one("messages", messages=[USER, ANSWER], tools=none).tools == ()


def test_calls_of_tools_go_through_and_nulls_do_not():
    """Parquet gives every message the keys of all, null where it has none."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
    example = one("messages", messages=[USER, call, ANSWER | {"role": "tool"}])
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}


def test_a_system_column_comes_first():
    example = one("messages", messages=[USER, ANSWER | {"weight": 1}], system="be brief")
    assert example.messages == (SYSTEM, USER, ANSWER)
    assert example.learned == (None, None, True)


def test_share_gpt_is_turned_into_roles():
    call = {"name": "f", "arguments": {"x": 1}}
    talk = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "hello", "weight": 0},
        {"from": "user", "value": "hi"},
        {"from": "assistant", "value": "hello"},
        {"from": "tool", "value": "8"},
    ]
    example = one("sharegpt", messages=talk, tools=json.dumps(TOOLS))
    calls = [{"type": "function", "function": call}]
    assert example.messages == (
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "7"},
        ANSWER,
        USER,
        ANSWER,
        {"role": "tool", "content": "8"},
    )
    assert example.learned == (None, None, None, None, False, None, None, None)
    assert example.tools == tuple(TOOLS)


def test_two_spellings_of_one_conversation_are_one_conversation():
    plain = one("messages", messages=[USER, ANSWER])
    turned = one("sharegpt", messages=SHARE["conversations"])
    assert plain == turned and plain.digest == turned.digest


@pytest.mark.parametrize(
    "columns, mask",
    [
        ({}, (True, True, True, True)),
        ({"labels": [-100, -100, 7, 8]}, (False, False, True, True)),
        ({"mask": [0, 0, 1, 1]}, (False, False, True, True)),
        ({"loss_mask": [False, False, True, True]}, (False, False, True, True)),
        ({"labels": "[-100, -100, 7, 8]"}, (False, False, True, True)),
    ],
)
def test_tokens_are_learned_by_labels_or_a_mask(columns, mask):
    """The mask [0, 0, 1, 1] makes of [1, 2, 3, 4] the labels [-100, -100, 3, 4], as TRL's does."""
    example = one("tokens", input_ids=[5, 6, 7, 8], **columns)
    assert (example.ids, example.mask) == ((5, 6, 7, 8), mask)


@pytest.mark.parametrize(
    "attention, mask",
    [
        ([1, 1, 1, 1], (False, False, True, False)),
        ([0, 1, 1, 1], (False, True, False)),
        ([1, 1, 1, 0], (False, False, True)),
    ],
)
def test_padding_is_cut_off_by_the_attention_mask_not_by_its_id(attention, mask):
    """The id 0 pads, and is also a token that is learned."""
    labels = [-100, -100, 0, -100]
    example = one("tokens", input_ids=[0] * 4, labels=labels, attention_mask=attention)
    assert (example.ids, example.mask) == ((0,) * len(mask), mask)
    with pytest.raises(DataError, match="nothing to learn"):
        one("tokens", input_ids=[0] * 4, labels=labels, attention_mask=[0, 0, 1, 1])


def test_the_digest_goes_by_content_alone():
    first = Example(where="a:1", kind="prompt", prompt="a", completion="b")
    assert first.digest == Example(where="b:9", kind="prompt", prompt="a", completion="b").digest
    others = [
        Example(where="a:1", kind="prompt", prompt="ab", completion=""),
        Example(where="a:1", kind="text", text="ab"),
        Example(where="a:1", kind="tokens", ids=(1, 2), mask=(True, False)),
        Example(where="a:1", kind="tokens", ids=(1, 2), mask=(True, True)),
        Example(where="a:1", kind="text", text="\ud800"),
    ]
    assert len({example.digest for example in (first, *others)}) == 6
    swapped = [dict(reversed(message.items())) for message in (USER, ANSWER)]
    assert (
        one("messages", messages=swapped).digest == one("messages", messages=[USER, ANSWER]).digest
    )


WORDS = ["role", "content", "from", "value", "user", "assistant", "gpt", "function_call", "type"]
WORDS += ["messages", "tools", "train", "weight", "text", "[]", "[[", "\ud800", "name"]
ODD = [None, True, False, 0, 1, -100, 0.5, 1.0, float("nan"), b"bytes", Decimal(1)]
ODD += [datetime(2024, 1, 1)]


def any_value(random, depth=3):
    """Any value that a row may hold: parquet has bytes, dates and decimals too."""
    kind = random.randrange(5 if depth else 2)
    if kind < 2:
        return random.choice(WORDS if kind else ODD)
    if kind == 2:
        return [any_value(random, depth - 1) for _ in range(random.randrange(4))]
    if kind == 3:
        return {random.choice(WORDS): any_value(random, depth - 1) for _ in range(3)}
    return some(random, USER | {"train": True, "weight": 1, "tool_calls": [], "value": "x"})


def some(random, row):
    """Most of a row, now and then with another value."""
    return {
        key: any_value(random, 2) if random.random() < 0.15 else value
        for key, value in row.items()
        if random.random() < 0.7
    }


@pytest.mark.parametrize("format", CONVERT)
def test_any_row_is_an_example_or_a_data_error(format):
    """Nothing else escapes, and what comes through is whole; both happen hundreds of times."""
    random, ends = Random(format), Counter()
    extra = {"system": "", "tools": "[]", "history": [["a", "b"]], "input": "x", "label": 1}
    masks = {"labels": [-100, 1], "mask": [0, 1], "attention_mask": [1, 1]}
    for _ in range(3000):
        talk = [some(random, USER), some(random, ANSWER | {"weight": 1})]
        talk = SHARE["conversations"] + talk[:1] if format == "sharegpt" else [USER, ANSWER, *talk]
        needed = {"text": "a", "prompt": "a", "completion": "b", "instruction": "a", "output": "b"}
        needed |= {"messages": talk, "input_ids": [1, 1]}
        row = {key: any_value(random) if random.random() < 0.1 else needed[key] for key in needed}
        row |= some(random, some(random, extra | masks))
        try:
            (example,) = examples(made_rows("made", lambda row=row: [row]), format)
        except DataError as error:
            assert str(error).startswith("made:1: ")
            ends["refused"] += 1
            continue
        ends["read"] += 1
        assert len(example.learned) == len(example.messages)
        assert len(example.mask) == len(example.ids)
        assert example.digest
        check_messages(list(example.messages) or [USER], "made")
    assert min(ends["read"], ends["refused"]) > 200, ends
