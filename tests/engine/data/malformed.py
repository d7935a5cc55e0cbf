"""Files of rows that are wrong, each with what its message must say."""

import gzip
import io
import json
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet


class Malformed(NamedTuple):
    """A file to write, the settings to read it with, and a part of the message it must lead to."""

    name: str
    file: str
    data: bytes
    message: str
    format: str = "auto"
    columns: str = ""


def jsonl(*rows: Any) -> bytes:
    """JSON lines; a row that is text already is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "".join(line + "\n" for line in lines).encode()


def parquet(**columns: list) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


GOOD = {"prompt": "2 + 2", "completion": "4"}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
TALK = {"messages": [USER, ANSWER]}
SHARE = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}


def talk(*messages: Any) -> bytes:
    """A good conversation in line 1, the one given in line 2."""
    return jsonl(TALK, {"messages": messages})


def line_217(bad: str) -> bytes:
    return jsonl(*[GOOD] * 216, bad, GOOD)


BROKEN_GZIP = gzip.compress(
    b"".join(jsonl({"prompt": str(n**7), "completion": "x"}) for n in range(9000)), mtime=0
)

MALFORMED = [
    # The file as a whole.
    Malformed("empty file", "a.jsonl", b"", "a.jsonl: an empty file"),
    Malformed("blank file", "a.jsonl", b"\n \n\n", "a.jsonl: an empty file"),
    Malformed("binary", "a.jsonl", b"\x89PNG\r\n\x1a\n\0\0", "binary file (NUL at byte 8)"),
    Malformed("binary gzip", "a.csv.gz", gzip.compress(b"ab\0"), "binary file (NUL at byte 2)"),
    Malformed("UTF-16", "a.jsonl", '{"text": "a"}'.encode("utf-16"), "iconv -t utf-8 -f utf-16"),
    Malformed("UTF-16 CSV", "a.csv", "text\nb\n".encode("utf-16"), "a.csv: UTF-16, not UTF-8"),
    Malformed("not gzip", "a.jsonl.gz", jsonl(GOOD), "a.jsonl.gz: cannot be read: Not a gzipped"),
    Malformed("cut gzip", "a.jsonl.gz", BROKEN_GZIP[:-9000], ": cannot be read: Compressed file"),
    Malformed("not parquet", "a.parquet", b"text\n", "a.parquet: not a readable parquet file"),
    Malformed("cut parquet", "a.parquet", parquet(text=["a"] * 9)[:-9], "not a readable parquet"),
    Malformed("torn text", "a.txt", b"fine\n\xff\n", "a.txt: not UTF-8 at byte 5"),
    # A line that is no row.
    Malformed(
        "latin-1 on a line",
        "a.jsonl",
        jsonl(GOOD) + b'{"text": "caf\xe9"}\n',
        "a.jsonl:2: not UTF-8 at byte 14 of the line; convert it, for example with iconv",
    ),
    Malformed(
        "JSON error", "a.jsonl", line_217('{"prompt": "x'), "a.jsonl:217: not valid JSON: Unt"
    ),
    Malformed("single quotes", "a.jsonl", line_217("{'prompt': 1}"), "a.jsonl:217: not valid JSON"),
    Malformed("two on a line", "a.jsonl", line_217("{} {}"), "a.jsonl:217: not valid JSON: Extra"),
    Malformed(
        "raw tab", "a.jsonl", line_217('{"a": "\t"}'), "217: not valid JSON: Invalid control"
    ),
    Malformed("NaN", "a.jsonl", line_217('{"a": NaN}'), "217: not valid JSON: NaN is not a number"),
    Malformed(
        "key twice", "a.jsonl", line_217('{"a;": 1, "a;": 2}'), 'JSON: key "a;" twice in one'
    ),
    Malformed(
        "deep", "a.jsonl", line_217('{"a":' + "[" * 99999), "217: not valid JSON: nested too"
    ),
    Malformed("long number", "a.jsonl", line_217("[" + "1" * 5000 + "]"), "217: not valid JSON"),
    Malformed("JSON of a list", "a.jsonl", line_217("[1]"), "217: a row is an object like"),
    Malformed("JSON of a text", "a.jsonl", line_217('"text"'), '{"text": "…"}, not text'),
    Malformed("JSON of null", "a.jsonl", line_217("null"), "a.jsonl:217: a row is an object like"),
    Malformed("only lists", "a.jsonl", jsonl([1], [2]), "a.jsonl:1: a row is an object"),
    # A JSON array, and one value.
    Malformed(
        "comma at the end", "a.json", b'[{"text": "a"},\n]', "a.json:2: not valid JSON: a comma"
    ),
    Malformed("no comma", "a.json", b'[{"text": "a"}\n{"text": "b"}]', "a.json:2: not valid JSON"),
    Malformed("open array", "a.json", b'[{"text": "a"}\n\n', "closing ] at column"),
    Malformed("after the array", "a.json", b'[{"text": "a"}]\nx', "more after the closing ]"),
    Malformed("bad element", "a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json:2: not valid"),
    Malformed("NaN in array", "a.json", b'[{"text": "a"}, {"text": NaN}]', "a.json:2: not valid"),
    Malformed("array of texts", "a.json", b'["a", "b"]', "a.json:1: a row is an object"),
    Malformed("latin-1 array", "a.json", b'[\n{"text": "\xe9"}]', "a.json:2: not UTF-8"),
    Malformed("empty array", "a.json", b"[]\n\n", "a.json: no rows in it"),
    Malformed("broken object", "a.json", b'{\n"text": "a",\n}', "neither line by line nor"),
    # CSV.
    Malformed(
        "ragged CSV",
        "a.csv",
        b'prompt,completion\n"two\nlines",b\na,b,c\n',
        "a.csv:4: cells: 3, columns: 2; put",
    ),
    Malformed("short CSV", "a.tsv", b"prompt\tcompletion\na\n", "a.tsv:2: cells: 1, columns: 2"),
    Malformed(
        "no header", "a.csv", b"What is 2+2?,4\nAnd 3+3?,6\n", "the first line of a CSV file"
    ),
    Malformed("open quote", "a.csv", b'text\nfine\n"open\nmore\n', "a.csv:3: not valid CSV"),
    Malformed("after quote", "a.csv", b'text\n"a"b\n', "a.csv:2: not valid CSV"),
    Malformed("long cell", "a.csv", b"text\n" + b"x" * 200_000, "a.csv:2: not valid CSV: field"),
    Malformed("latin-1 CSV", "a.csv", b"text\nfine\ncaf\xe9\n", "a.csv:3: not UTF-8"),
    Malformed(
        "same columns", "a.csv", b"text,text\na,b\n", 'a.csv:1: two columns are named "text"'
    ),
    Malformed("only a header", "a.csv", b"prompt,completion\n", "a.csv: no rows in it"),
    Malformed(
        "number in JSON of CSV", "a.csv", b"messages\n7\n", '"messages" is a number, not a li'
    ),
    Malformed(
        "no JSON in CSV", "a.csv", b"messages\nhi there\n", '2: "messages" is text, and no JSON'
    ),
    # Columns.
    Malformed(
        "no completion", "a.jsonl", jsonl(GOOD, {"prompt": "x"}), 'a.jsonl:2: no "completion"'
    ),
    Malformed(
        "only prompts", "a.jsonl", jsonl({"prompt": "x"}), 'a.jsonl:1: no "completion"; the r'
    ),
    Malformed(
        "null completion",
        "a.jsonl",
        jsonl(GOOD, GOOD | {"completion": None}),
        'a.jsonl:2: "completion" is null',
    ),
    Malformed(
        "number as completion",
        "a.jsonl",
        jsonl(GOOD, GOOD | {"completion": 4}),
        'a.jsonl:2: "completion" is a number, not text',
    ),
    Malformed(
        "null in parquet", "a.parquet", parquet(text=["a", None]), 'a.parquet:2: "text" is null'
    ),
    Malformed("numbers in parquet", "a.parquet", parquet(text=[1]), '"text" is a number, not text'),
    Malformed("empty text", "a.jsonl", jsonl({"text": ""}), 'a.jsonl:1: "text" is empty'),
    Malformed(
        "misspelt column",
        "a.jsonl",
        jsonl({"prompt": "a", "completoin": "b"}),
        "data.columns=completion=completoin",
    ),
    Malformed(
        "other names",
        "a.jsonl",
        jsonl({"question": "a", "answer": "b"}),
        "data.columns=prompt=question,completion=answer",
    ),
    Malformed(
        "no known column", "a.jsonl", jsonl({"x": 1, "y": 2}), '1: columns are "x", "y", of no f'
    ),
    Malformed(
        "rename of nothing",
        "a.jsonl",
        jsonl({"question": "a", "answer": "b"}),
        'a.jsonl:1: no "questoin", which data.columns reads prompt from; did you mean question?',
        columns="prompt=questoin,completion=answer",
    ),
    Malformed(
        "rename of nothing optional",
        "a.jsonl",
        jsonl({"instruction": "a", "output": "b", "context": "c"}),
        'data.columns: no row has "contxt", which input is read from',
        columns="input=contxt",
    ),
    Malformed(
        "mixed formats",
        "a.jsonl",
        jsonl(GOOD, GOOD, TALK, GOOD),
        "a.jsonl:3: looks like messages, but 3 of 4 rows look like prompt",
    ),
    Malformed(
        "preferences",
        "a.jsonl",
        jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}),
        'a.jsonl:1: "chosen" and "rejected" are preferences, which alignment learns from',
    ),
    Malformed("judged", "a.jsonl", jsonl(GOOD | {"label": False}), '1: "label" says which answers'),
    Malformed(
        "history",
        "a.jsonl",
        jsonl({"instruction": "a", "output": "b", "history": ["c", "d"]}),
        'a.jsonl:1: "history" is a list of pairs',
    ),
    # Messages.
    Malformed("no messages", "a.jsonl", talk(), "a.jsonl:2: the conversation has no messages"),
    Malformed("text as message", "a.jsonl", talk("hi"), "a.jsonl:2: message 1 is not an object"),
    Malformed(
        "no role", "a.jsonl", talk(USER, {"content": "x"}), 'a.jsonl:2: message 2 has no "role"'
    ),
    Malformed(
        "unknown role",
        "a.jsonl",
        talk(USER, ANSWER | {"role": "asistant"}),
        '2: message 2 has role "asistant"; did you mean assistant?',
    ),
    Malformed(
        "null content", "a.jsonl", talk(USER, ANSWER | {"content": None}), 'message 2 has no "co'
    ),
    Malformed(
        "number as content",
        "a.jsonl",
        talk(USER, ANSWER | {"content": 4}),
        "neither text nor a list",
    ),
    Malformed(
        "image",
        "a.jsonl",
        talk(USER | {"content": [{"type": "image", "url": "x"}]}, ANSWER),
        'a.jsonl:2: message 1 has a part of type "image"; only text',
    ),
    Malformed(
        "no assistant", "a.jsonl", talk(USER), "2: nothing to learn: no message of assistant"
    ),
    Malformed(
        "all weights 0",
        "a.jsonl",
        talk(USER, ANSWER | {"weight": 0}),
        "nothing to learn: all answers are marked as not learned",
    ),
    Malformed(
        "half weight", "a.jsonl", talk(USER, ANSWER | {"weight": 0.5}), 'has "weight" 0.5; it is'
    ),
    Malformed(
        "train yes", "a.jsonl", talk(USER, ANSWER | {"train": "yes"}), 'has "train" "yes"; it is'
    ),
    Malformed(
        "train or not",
        "a.jsonl",
        talk(USER, ANSWER | {"train": True, "weight": 0}),
        "a.jsonl:2: message 2 is to be learned and is not",
    ),
    Malformed(
        "ShareGPT in the middle",
        "train.jsonl",
        jsonl(*[TALK] * 216, {"messages": [USER, ANSWER, {"role": "gpt", "value": "x"}]}),
        'train.jsonl:217: message 3 has role "gpt" and no "content"; looks like ShareGPT:'
        " data.format=sharegpt",
    ),
    Malformed(
        "tools", "a.jsonl", jsonl(TALK | {"tools": "[1]"}), '"tools" is not a list of objects'
    ),
    Malformed(
        "system twice",
        "a.jsonl",
        jsonl({"system": "a", "messages": [USER | {"role": "system"}, USER, ANSWER]}),
        '"system" beside a first message',
    ),
    Malformed(
        "messages as ShareGPT",
        "a.jsonl",
        jsonl(SHARE, TALK),
        'a.jsonl:2: message 1 has no "from" and "value"; looks like messages: data.format=messages',
        format="sharegpt",
    ),
    Malformed(
        "ShareGPT as messages",
        "a.jsonl",
        jsonl(SHARE),
        'a.jsonl:1: message 1 has no "role" and no "content"; looks like ShareGPT',
        format="messages",
    ),
    Malformed(
        "stranger in ShareGPT",
        "a.jsonl",
        jsonl({"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}),
        'a.jsonl:1: message 2 is from "bot"; known are human',
    ),
    Malformed(
        "no call in ShareGPT",
        "a.jsonl",
        jsonl({"conversations": [{"from": "function_call", "value": "get_time()"}]}),
        "a.jsonl:1: message 1 is a function_call and no JSON",
    ),
    # Token ids.
    Malformed(
        "short labels",
        "a.jsonl",
        jsonl({"input_ids": [1, 2, 3], "labels": [-100, 2]}),
        'a.jsonl:1: 2 in "labels" for 3 in "input_ids"',
    ),
    Malformed(
        "shifted labels",
        "a.jsonl",
        jsonl({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}),
        "labels[0] is 2; it is 1 or -100",
    ),
    Malformed(
        "negative id", "a.jsonl", jsonl({"input_ids": [1, -2]}), "input_ids[1] is -2, not a tok"
    ),
    Malformed(
        "id of text", "a.jsonl", jsonl({"input_ids": [1, "2"]}), 'input_ids[1] is "2", not a tok'
    ),
    Malformed(
        "fraction as id", "a.jsonl", jsonl({"input_ids": [1.5, 2]}), "input_ids[0] is 1.5, not"
    ),
    Malformed(
        "true as id", "a.jsonl", jsonl({"input_ids": [1, True]}), "input_ids[1] is true, not"
    ),
    Malformed("huge id", "a.jsonl", jsonl({"input_ids": [1, 2**31]}), "input_ids[1] is 2147483648"),
    Malformed("no ids", "a.jsonl", jsonl({"input_ids": []}), "a.jsonl:1: nothing to learn"),
    Malformed(
        "all masked", "a.jsonl", jsonl({"input_ids": [1, 2], "mask": [1, 0]}), "1: nothing to learn"
    ),
    Malformed(
        "mask of 2", "a.jsonl", jsonl({"input_ids": [1, 2], "mask": [0, 2]}), "mask[1] is 2; it is"
    ),
    Malformed(
        "labels and mask",
        "a.jsonl",
        jsonl({"input_ids": [1, 2], "labels": [-100, 2], "mask": [0, 1]}),
        '"labels" and "mask"; one says what is learned',
    ),
    Malformed(
        "hole in attention",
        "a.jsonl",
        jsonl({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}),
        '"attention_mask" marks padding',
    ),
]
