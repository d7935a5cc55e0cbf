"""Rows become examples of one format, or every bad row is named."""

import json

import pytest

from engine.data.formats import BadRows, detect, examples
from engine.data.rows import made_rows, open_rows
from engine.errors import DataError, RecipeError
from tests.engine.data.malformed import GOOD, MALFORMED, SHARE, TALK, jsonl


def read(rows, format="auto", columns=""):
    """All examples of rows as the commands read them: the format first, if it is not given."""
    if format == "auto":
        format = detect(rows, columns).format
    return list(examples(rows, format, columns))


def made(*values):
    return made_rows("made", lambda: values)


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_a_malformed_file_says_where_and_what(tmp_path, case):
    file = tmp_path / case.file
    file.write_bytes(case.data)
    with pytest.raises(DataError) as caught:
        read(open_rows(str(file))["train"], case.format, case.columns)
    assert case.message in str(caught.value)
    assert str(caught.value).startswith((case.file, "data.columns", str(file)))


def test_five_bad_rows_are_told_and_the_others_counted():
    """Seven of ten are bad; a good one after a bad one is not handed on."""
    rows = made(*[GOOD] * 2, *[{"prompt": n, "completion": "x"} for n in range(7)], GOOD)
    stream = examples(rows, "prompt")
    assert [next(stream).where, next(stream).where] == ["made:1", "made:2"]
    with pytest.raises(BadRows) as caught:
        next(stream)
    lines = str(caught.value).splitlines()
    assert caught.value.count == 7 and caught.value.exit_code == 3
    assert lines[:5] == [f'made:{n}: "prompt" is a number, not text' for n in range(3, 8)]
    assert lines[5:] == ["… and 2 more"]


def test_a_problem_is_one_line_whatever_it_quotes():
    talk = {"messages": [{"role": "a\nb\x1b[2J" * 400, "content": "x"}]}
    with pytest.raises(BadRows) as caught:
        list(examples(made(talk), "messages"))
    (line,) = str(caught.value).splitlines()
    assert line.isprintable() and len(line) < 1100


@pytest.mark.parametrize(
    "row, format",
    [
        ({"text": "a"}, "text"),
        (GOOD, "prompt"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "prompt"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "### a b"}, "alpaca"),
        (TALK, "messages"),
        (TALK | {"prompt": "a", "prompt_id": "7"}, "messages"),
        ({"conversations": TALK["messages"]}, "messages"),
        (SHARE, "sharegpt"),
        ({"messages": SHARE["conversations"]}, "sharegpt"),
        ({"messages": json.dumps(SHARE["conversations"])}, "sharegpt"),
        ({"conversations": [{"role": "human", "content": "a"}]}, "sharegpt"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1], "text": "a"}, "tokens"),
        ({"text": "a", "prompt": None, "completion": None, "messages": None}, "text"),
    ],
)
def test_a_format_is_known_by_its_columns(row, format):
    assert detect(made(row, row)).format == format
    assert detect(made(row, row)).counts == {format: 2}


def test_the_format_is_found_over_all_rows_not_the_first():
    """A first row that lacks a column, or is no JSON, does not decide what the others are."""
    found = detect(made({"prompt": "a"}, 7, *[GOOD] * 3))
    assert found.format == "prompt"
    assert found.counts == {"unknown": 1, "unreadable": 1, "prompt": 3}
    with pytest.raises(DataError, match=r"^made:100: looks like text, but 99 of 100 rows"):
        detect(made(*[GOOD] * 99, {"text": "a"}))


def test_columns_are_renamed_through_objects_lists_and_dots():
    row = {"q": {"text": "a", "choices": ["x", "y"]}, "a.b": "c"}
    (example,) = read(made(row), columns="prompt=q.choices.1, completion=a.b")
    assert (example.prompt, example.completion) == ("y", "c")
    swapped = {"prompt": "answer", "completion": "question"}
    (example,) = read(made(swapped), columns="prompt=completion,completion=prompt")
    assert (example.prompt, example.completion) == ("question", "answer")


def test_a_renamed_column_decides_the_format():
    row = TALK | {"question": "a", "answer": "b"}
    assert detect(made(row)).format == "messages"
    assert detect(made(row), "prompt=question,completion=answer").format == "prompt"


def test_an_optional_column_may_be_missing_from_some_rows():
    rows = made(
        {"instruction": "a", "output": "b", "context": "c"}, {"instruction": "a", "output": "b"}
    )
    prompts = [example.prompt for example in read(rows, columns="input=context")]
    assert prompts == ["a\n\nc", "a"]


def test_the_chosen_answers_of_preferences_can_be_learned_as_told():
    rows = made({"prompt": "a", "chosen": "b", "rejected": "c"})
    (example,) = read(rows, columns="completion=chosen")
    assert (example.prompt, example.completion) == ("a", "b")
    rows = made({"chosen": TALK["messages"], "rejected": TALK["messages"]})
    with pytest.raises(DataError, match=r"data\.columns=messages=chosen$"):
        read(rows)
    assert len(read(rows, columns="messages=chosen")[0].messages) == 2


@pytest.mark.parametrize(
    "columns, message",
    [
        ("prompt", "data.columns: prompt is not like prompt=question"),
        ("prompt=", "data.columns: prompt= is not like"),
        ("promt=a", "no format reads promt; did you mean prompt?"),
        ("prompt=a,prompt=b", "data.columns: prompt is named twice"),
    ],
)
def test_columns_that_cannot_be_meant_are_a_mistake_in_the_recipe(columns, message):
    with pytest.raises(RecipeError) as caught:
        detect(made(GOOD), columns)
    assert message in str(caught.value)


def test_good_rows_in_other_clothes_are_not_malformed(tmp_path):
    """A byte order mark, Windows line ends, turns that a template may or may not take: all pass."""
    file = tmp_path / "a.jsonl"
    two_users = {"messages": [*TALK["messages"][:1] * 2, *TALK["messages"][1:] * 2]}
    answer_first = {"messages": TALK["messages"][::-1]}
    lines = jsonl(TALK, two_users, answer_first)
    file.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    assert [e.where for e in read(open_rows(str(file))["train"])] == [
        f"a.jsonl:{n}" for n in (1, 3, 5)
    ]
