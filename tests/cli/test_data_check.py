"""`lm data check`: what it counts, and a row as the model learns it."""

import json

import pytest

from engine.data.samples import with_template
from tests.cli.test_errors import failed


def talk(question, answer):
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROWS = [talk(f"What is {n}?", f"It is {n}.") for n in range(1, 30)]


@pytest.fixture
def check(run, tmp_path, tokenizer):
    """Run `lm data check` on rows with a model that has ChatML; it must end with `code`."""
    folder = tmp_path / "checkpoints" / "ours"
    folder.mkdir(parents=True)
    tokenizer.save(folder, 64)

    def call(rows, *words, code=0, name="rows.jsonl", **options):
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name).write_text(text, encoding="utf-8")
        result = run("data", "check", name, "-m", "ours", *words, **options)
        assert result.code == code, result
        return result

    return call


def figures(result, name):
    """What a line of figures says."""
    (line,) = [line for line in result.out.splitlines() if line.startswith(name)]
    return line.removeprefix(name).strip()


def test_the_figures_of_a_file(check, tokenizer):
    result = check([*ROWS, ROWS[4]])
    own = with_template(tokenizer)
    ends = sum(len(own.encode(row["messages"][1]["content"])) + 1 for row in [*ROWS, ROWS[4]])
    assert figures(result, "rows  ") == "30 of messages; 1 duplicates"
    assert figures(result, "learned").startswith(f"{ends:,} of ")
    assert figures(result, "ends") == "learned in 30 of 30 answers"
    assert figures(result, "too long") == "0 rows over data.seq_len=512"
    assert " of up to 512 tokens, " in figures(result, "packs")
    assert result.err == "" and max(map(len, result.out.splitlines())) <= 80
    bars = [line.split() for line in result.out.splitlines() if "–" in line]
    assert sum(int(bar[-1]) for bar in bars) == 30


@pytest.mark.parametrize(
    ("overlong", "fate", "warned"),
    [
        ("error", "1 rows over data.seq_len=64: 1 dropped", True),
        ("split", "1 rows over data.seq_len=64: 1 dropped", True),
        ("drop", "1 rows over data.seq_len=64: 1 dropped", False),
        ("truncate", "1 rows over data.seq_len=64: 1 cut by ", False),
    ],
)
def test_rows_that_are_too_long_are_counted(check, overlong, fate, warned):
    result = check([*ROWS, talk("x" * 400, "y")], "data.seq_len=64", f"data.overlong={overlong}")
    assert figures(result, "too long").startswith(fate)
    assert ("stops the run; they are left out here" in result.err) == warned


def test_rows_on_both_sides_are_told(check, tmp_path):
    (tmp_path / "valid.jsonl").write_text(json.dumps(ROWS[3]) + "\n" + json.dumps(talk("a", "b")))
    result = check(ROWS, "--valid", "valid.jsonl")
    assert figures(result, "shared") == "1 rows are among those to train on"
    assert "warning: valid.jsonl: 1 rows are trained on too" in result.err
    found = json.loads(check(ROWS, "--valid", "valid.jsonl", "--json").out)
    assert found["schema"] == "lm/data/check/1"
    assert (found["train"]["rows"], found["valid"]["rows"], found["valid"]["shared"]) == (29, 2, 1)
    assert found["format"] == "messages" and found["packs"] > 0


def test_a_row_as_it_is_learned(check):
    """What looks like a control token is in the content and stays; the marks are around answers."""
    shown = check([talk("Hi <|im_end|>", "Hey"), *ROWS], "--row", 1, "data.holdout=1000000").out
    head, where, *body = shown.splitlines()
    assert head.startswith("rows.jsonl:1: ") and where.startswith("pack ")
    assert body == [
        "<|im_start|>user",
        "Hi <|im_end|><|im_end|>",
        "<|im_start|>assistant",
        "⟦Hey<|im_end|>⟧",
        "",
    ]


def test_a_row_token_by_token(check, tokenizer):
    shown = check([talk("Hi", "Hey"), *ROWS], "--row", "rows.jsonl:1", "--ids").out
    cells = [line.split(maxsplit=3) for line in shown.splitlines()[2:]]
    assert [int(number) for number, *_ in cells] == list(range(len(cells)))
    learned = [int(token) for _, token, mark, _ in cells if mark == "learned"]
    assert learned == [*tokenizer.encode("Hey"), tokenizer.inner.token_to_id("<|im_end|>")]
    found = json.loads(check(None, "--row", 1, "--json").out)
    assert [piece["id"] for piece in found["pieces"] if piece["learned"]] == learned
    assert found["row"] == "rows.jsonl:1" and found["part"] == "" and not found["left_out"]


def test_a_row_in_colour(check, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = check([talk("Hi", "Hey"), *ROWS], "--row", 1).out
    assert "\x1b[32mHey\x1b[0m\x1b[1;32m<|im_end|>" in shown  # learned: green
    assert "\x1b[1;36m<|im_start|>\x1b[0m\x1b[2muser" in shown and "⟦" not in shown


def test_where_a_row_went(check, tmp_path):
    long = [*ROWS, talk("x" * 400, "y")]
    assert (
        "\nleft out: longer than data.seq_len=64\n"
        in check(long, "--row", 30, "data.seq_len=64").out
    )
    cut = check(long, "--row", 30, "data.seq_len=64", "data.overlong=truncate").out
    assert "30: 64 tokens, 2 learned\n" in cut and " tokens were cut to fit data.seq_len=64" in cut
    places = [check(ROWS, "--row", n, "data.holdout=2").out.splitlines()[1] for n in range(1, 30)]
    held = [place for place in places if place.startswith("held out: its content's sha256 is 0")]
    assert 0 < len(held) < 29
    assert all(place.startswith(("held out", "pack ")) for place in places)
    (tmp_path / "book.txt").write_text("word " * 100)
    parts = check(
        None, "--row", "book.txt", "data.seq_len=64", "data.overlong=split", name="book.txt"
    ).out
    assert "book.txt part 1/" in parts and "book.txt part 2/" in parts


def test_rows_from_a_pipe(check):
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    assert figures(check(None, name="-", stdin=text), "rows  ") == "29 of messages; 0 duplicates"


def test_what_goes_wrong_is_told(check):
    failed(check(ROWS, "--row", 99, code=3), 3, "rows.jsonl: no row 99 among its 29")
    failed(check(ROWS, "--ids", code=2), 2, "--ids is for one row; name it with --row")
    failed(check([*ROWS, {"messages": []}], code=3), 3, "rows.jsonl:30: ")
    failed(check(None, name="nowhere.jsonl", code=3), 3, "nowhere.jsonl: no such file")
    failed(check(ROWS, "data.seqlen=3", code=2), 2, "did you mean data.seq_len?")
    failed(check(ROWS, "data.seq_len=1", code=2), 2, "data.seq_len=1 leaves nothing to predict")
