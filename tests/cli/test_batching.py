"""`lm generate --batch`: each line as if alone, in order, with its own errors, and resumable."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from io import FileIO

import pytest

from cli import batch_lines, batch_output, batching
from tests.cli.test_errors import failed
from tests.conftest import command_environment
from tests.engine.interop.folders import imported, write_folder

SYSTEM = "You answer in few words, and never say anything about the weather. " * 3
LINES = [
    {"id": 7, "prompt": "def f(", "temperature": 0},
    {"id": "b", "prompt": "class A:", "temperature": 1.1, "top_k": 9, "seed": 3, "max_tokens": 20},
    {"prompt": "import ", "stop": ["e", "s"], "repetition_penalty": 1.4},
    {
        "id": 1.5,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "a"}],
    },
    {
        "id": "x",
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "b"}],
    },
    {
        "custom_id": "r-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "any",
            "messages": [{"role": "user", "content": "hello"}],
            "max_completion_tokens": 4,
            "logprobs": True,
            "top_logprobs": 2,
            "temperature": 0,
            "stream": False,
            "stop": None,
        },
    },
    {"id": "last", "prompt": "x = 1\n" * 40, "max_tokens": 12, "min_p": 0.1, "logprobs": 0},
]
OPTIONS = ["--seed", 5, "--max-tokens", 9, "--top-p", 0.95]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a small model."""
    folder = tmp_path_factory.mktemp("batch")
    write_folder(folder / "source", tokenizer, max_seq_len=512)
    imported(folder / "source", folder / "checkpoints" / "tiny")
    return folder


@pytest.fixture
def here(run, place, tmp_path):
    def call(*words, stdin=b"", lines=None, **options):
        if lines is not None:
            (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = [tmp_path / "in.jsonl" if word == "in" else word for word in words]
        words = [tmp_path / "out.jsonl" if word == "out" else word for word in words]
        return run("generate", "-m", "tiny", *words, stdin=stdin, cwd=place, **options)

    return call


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("rows", [1, 3])
def test_each_line_says_what_it_says_alone(here, tmp_path, rows):
    result = here("--batch", "in", "--rows", rows, *OPTIONS, lines=LINES)
    assert result.code == 0, result.err
    found = rows_of(result.out)
    assert [row["line"] for row in found] == list(range(1, len(LINES) + 1))
    assert [row["id"] for row in found] == [7, "b", None, 1.5, "x", "r-1", "last"]
    assert [row["seed"] for row in found] == [5, 3, 7, 8, 9, 10, 11]
    for line, row in zip(LINES, found, strict=True):
        assert row["schema"] == "lm/batch/1"
        one = alone(here, tmp_path, line, row["seed"])
        for key in ("text", "finish_reason", "prompt_tokens", "logprobs"):
            assert row.get(key) == one.get(key), (line, key)
        assert row["tokens"] == len(one["tokens"])
    assert "7 ok, 0 failed" in result.err and f"{rows} rows" in result.err


def alone(here, tmp_path, line: dict, seed: int) -> dict:
    """What the command says to one line without --batch."""
    body = {**line, **line.get("body", {})}
    words = ["--json", "--seed", seed, "--top-p", 0.95]
    words += ["--max-tokens", body.get("max_tokens") or body.get("max_completion_tokens") or 9]
    for key in ("temperature", "top_k", "min_p", "repetition_penalty"):
        words += [f"--{key.replace('_', '-')}", body[key]] if key in body else []
    for stop in body.get("stop") or []:
        words += ["--stop", stop]
    if "logprobs" in body:
        words += ["--logprobs", body.get("top_logprobs", 0)]
    if "messages" in body:
        (tmp_path / "m.json").write_text(json.dumps(body["messages"]))
        words += ["--messages", tmp_path / "m.json"]
    else:
        words += [body["prompt"]]
    return json.loads(here(*words).out)


WRONG = {
    "nonsense": "not valid JSON: Expecting value at column 1",
    "[1]": "not a JSON object",
    '{"prompt": "x", "prompt": "y"}': "stands twice",
    '{"prompt": "x", "temperature": NaN}': "NaN",
    '{"prompt": ' + "[" * 100_000: "not valid JSON",
    '{"prompt": "x", "tmperature": 0}': "tmperature is not a setting of a line; did you mean temp",
    '{"prompt": "x", "temperature": -1}': "temperature is out of range",
    '{"prompt": "x", "temperature": "hot"}': "temperature must be a number",
    '{"prompt": "x", "max_tokens": 1e999}': "max_tokens must be finite",
    '{"prompt": "x", "max_tokens": 2.5}': "max_tokens must be a whole number",
    '{"prompt": "x", "seed": -1}': "seed must be a whole number from 0",
    '{"prompt": "x", "stop": ["a", ""]}': "stop must be a text",
    '{"prompt": "x", "logprobs": 101}': "logprobs must be a whole number from 0 to 100",
    '{"prompt": 7}': "prompt is not text",
    '{"prompt": ""}': "the prompt is empty",
    '{"id": 1}': "a prompt or messages",
    '{"prompt": "x", "messages": []}': "a prompt or messages",
    '{"messages": [{"content": "x"}]}': 'message 1 has no "role"',
    '{"messages": [{"role": "user", "content": "x"}], "tools": []}': "tools is not a setting",
    '{"id": [1], "prompt": "x"}': "id is neither text nor a number",
    '{"id": 1e999, "prompt": "x"}': "id is neither text nor a number",
    '{"id": 1, "custom_id": 2, "prompt": "x"}': "which one",
    '{"custom_id": "a", "body": []}': "body is not an object",
    '{"custom_id": "a", "body": {"prompt": "x"}, "prompt": "y"}': "prompt is not a setting",
    '{"custom_id": "a", "body": {"prompt": "x", "n": 2}}': "n: only 1",
    '{"custom_id": "a", "body": {"prompt": "x", "stream": true}}': "stream: only false",
    '{"custom_id": "a", "body": {"prompt": "x", "top_logprobs": 2}}': "needs logprobs: true",
    '{"prompt": "x", "max_tokens": 512}': "> context 512",
    json.dumps({"prompt": "x = 1\n" * 300}): "> context 512",
}


def test_a_bad_line_is_an_error_of_its_own(here, tmp_path):
    good = '{"id": "good", "prompt": "def f(", "temperature": 0}'
    lines = [good, *WRONG, good]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(line.encode() for line in lines) + b"\n\xff\n")
    result = here("--batch", "in", "--rows", 2, "-o", "out", "-q", "--max-tokens", 3)
    assert result.code == 3 and result.out == ""
    assert result.err.startswith(f"2 ok, {len(WRONG) + 1} failed") and result.err.count("\n") == 1
    found = rows_of((tmp_path / "out.jsonl").read_text())
    assert [row["line"] for row in found] == list(range(1, len(WRONG) + 4))
    first, *wrong, second, no_text = found
    assert first["text"] == second["text"] and first["id"] == "good"
    for row, (line, expected) in zip(wrong, WRONG.items(), strict=True):
        assert expected in row["error"]["message"], (line, row)
        assert row["error"]["exit_code"] == (6 if "context" in expected else 3)
        assert "text" not in row
    assert result.err.endswith(" · failed lines: 2, 3, 4, 5, 6 …\n")
    assert not [row for row in wrong if "--" in row["error"]["message"]]  # a line has no options
    assert "not UTF-8" in no_text["error"]["message"]
    assert [row["id"] for row in wrong if row["id"]] == [1, *["a"] * 5]


def test_names_that_no_text_can_hold_and_lines_of_every_kind(here):
    data = b'\xef\xbb\xbf{"id": "\\ud800", "prompt": "a"}\r\n\n  \n'
    data += b'{"id": 12345678901234567890, "prompt": "a"}'
    result = here("--batch", "-", "--max-tokens", 0, stdin=data)
    assert result.code == 0
    first, second = rows_of(result.out)
    assert first["id"] == "\ud800" and (first["line"], second["line"]) == (1, 4)
    assert second["id"] == 12345678901234567890
    assert (first["text"], first["tokens"], first["finish_reason"]) == ("", 0, "length")


def test_what_is_no_batch_ends_at_once(here, tmp_path, monkeypatch):
    failed(here("--batch", "-", "-o", "out", stdin=b""), 3, "holds no requests")
    failed(here("--batch", "-", "-o", "out", stdin=b"\n \n"), 3, "holds no requests")
    failed(here("--batch", "-", "-o", "out", stdin=b"\x89PNG\0\1"), 3, "a binary file")
    failed(here("--batch", tmp_path / "nowhere", "-o", "out"), 3, "nowhere")
    failed(here("--batch", tmp_path, "-o", "out"), 3, str(tmp_path))
    failed(here("--batch", "/dev/zero", "-o", "out"), 3, "a device")
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(batch_lines, "LONGEST", 3 << 20)
    long = b'{"prompt": "' + b"x" * (5 << 20) + b'"}\n{"prompt": "x", "max_tokens": 1}\n'
    result = here("--batch", "-", stdin=long)
    assert result.code == 3
    first, second = rows_of(result.out)
    assert first["error"]["message"] == "the line is longer than 3 MB" and second["tokens"] == 1


def test_options_that_do_not_fit(here):
    for words in (["-o", "x"], ["--rows", 2], ["--resume"], ["--force"]):
        failed(here("text", *words), 2, f"{words[0]}: leave it out, it is for --batch")
    own = " does not go with --batch: its lines have their own"
    for words in (["text"], ["-f", "x"], ["--messages", "x"]):
        name = "a prompt" if words == ["text"] else words[0]
        failed(here("--batch", "in", *words), 2, f"error: {name}{own}\n")
    for words in (["-n", 2], ["--show-prompt"], ["--verify"], ["--draft", "lookup"]):
        failed(here("--batch", "in", *words), 2, f"error: {words[0]} does not go with --batch\n")
    failed(here("--batch", "in", "--prefix-cache"), 2, "--prefix-cache does not go with --batch")
    failed(here("--batch", "in", "--resume", lines=LINES), 2, "-o")
    failed(here("--batch", "in", "-o", "in"), 2, "is the input itself")
    failed(here("--batch", "in", "-o", "/dev/full", "--max-tokens", 1), 4, "cannot be written")
    failed(here("--batch", "in", "-o", "/nowhere/x"), 4, "/nowhere/x: cannot be written")


def test_chat_and_system_hold_for_every_line(here):
    words = ["--batch", "in", "--temperature", 0, "--max-tokens", 6]
    plain = {"prompt": "hello"}
    messages = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "hello"}]
    (asked,) = rows_of(here(*words, "--chat", "--system", "Hm.", lines=[plain]).out)
    (said,) = rows_of(here(*words, lines=[{"messages": messages}]).out)
    (continued,) = rows_of(here(*words, lines=[plain]).out)
    assert asked["text"] == said["text"] and asked["prompt_tokens"] == said["prompt_tokens"]
    assert continued["prompt_tokens"] < asked["prompt_tokens"]


def test_a_prompt_may_be_cut_but_no_conversation(here):
    long = "x = 1\n" * 300
    lines = [{"prompt": long}, {"messages": [{"role": "user", "content": long}]}]
    words = ["--max-tokens", 4, "--on-overflow", "left"]
    cut, refused = rows_of(here("--batch", "in", *words, lines=lines).out)
    assert cut["prompt_tokens"] == 508 and cut["cut_prompt_tokens"] > 0
    assert "context 512" in refused["error"]["message"]


def test_an_output_is_not_overwritten_unasked(here, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["--batch", "in", "-o", "out", "--max-tokens", 2, "--seed", 1]
    assert here(*words, "--resume", lines=LINES[:2]).code == 0  # there is nothing yet
    whole = out.read_bytes()
    failed(here(*words), 2, "exists; --resume goes on with it, --force replaces it")
    assert out.read_bytes() == whole
    failed(here(*words, "--resume", "--force"), 2, "--force")
    failed(here("--batch", "in", "-o", "/dev/null", "--resume"), 2, "leave out --resume")
    assert here(*words, "--force", lines=LINES[:1]).code == 0
    assert rows_of(out.read_text()) == rows_of(whole.decode())[:1]


def test_a_cut_output_is_continued_to_the_byte(here, tmp_path):
    out = tmp_path / "out.jsonl"
    lines = [*LINES, {"bad": 1}, {"prompt": "y", "seed": 1}]
    words = ["--batch", "in", "-o", "out", "--max-tokens", 4]  # seeds chosen at random
    assert here(*words, lines=lines).code == 3
    whole = out.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in (ends[1], ends[2] + 1, ends[4] - 1, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        result = here(*words, "--resume", "--rows", 2)
        assert result.code == 3 and f"{len(lines) - 1} ok, 1 failed" in result.err, result.err
        assert out.read_bytes() == whole, cut


def test_lines_that_failed_are_answered_again_in_their_place(here, tmp_path, monkeypatch):
    """The input was mended, and has grown; the answers that were there are not made again."""
    out = tmp_path / "out.jsonl"
    words = ["--batch", "in", "-o", "out", "--max-tokens", 4]
    broken = [LINES[0], {"bad": 1}, LINES[1], {"prompt": ""}, {"prompt": "x", "max_tokens": 600}]
    assert here(*words, "--seed", 5, lines=broken).code == 3
    out.chmod(0o640)
    begun = rows_of(out.read_text())

    mended = [LINES[0], {"id": "m", "prompt": "def g("}, LINES[1], {"prompt": ""}, LINES[2], *LINES]
    asked = []
    monkeypatch.setattr(batching.Maker, "job", spied(batching.Maker.job, asked))
    result = here(*words, "--seed", 5, "--resume", "--rows", 2, lines=mended)
    assert asked == [2, 4, 5, *range(6, 13)]
    assert result.code == 3 and "11 ok, 1 failed" in result.err and "2 lines from" in result.err
    assert result.err.endswith("failed lines: 4\n")
    found = rows_of(out.read_text())
    assert [row["line"] for row in found] == list(range(1, 13))
    assert [found[i] for i in (0, 2, 3)] == [begun[i] for i in (0, 2, 3)]
    assert out.stat().st_mode & 0o777 == 0o640 and sorted(tmp_path.glob(".out*")) == []
    assert here(*words, "--seed", 5, "--force").code == 3
    assert rows_of(out.read_text()) == found


def spied(job, asked):
    def call(self, number, line):
        asked.append(number)
        return job(self, number, line)

    return call


def test_what_failed_stays_if_it_cannot_be_replaced(here, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    words = ["--batch", "in", "-o", "out", "--max-tokens", 4, "--seed", 5]
    assert here(*words, lines=[LINES[0], {"bad": 1}, LINES[1]]).code == 3
    whole, mended = out.read_bytes(), [LINES[0], LINES[2], LINES[1]]

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(batch_output.os, "replace", full)
        result = here(*words, "--resume", lines=mended)
        failed(result, 4, "No space left on device; make room, then go on with --resume")
    assert out.read_bytes() == whole and sorted(tmp_path.glob(".out*")) == []
    assert here(*words, "--resume", lines=mended).code == 0
    assert [row["line"] for row in rows_of(out.read_text())] == [1, 2, 3]


def test_only_the_same_batch_is_continued(here, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["--batch", "in", "-o", "out", "--max-tokens", 2]
    assert here(*words, "--seed", 1, lines=LINES[:3]).code == 0
    whole = out.read_bytes()

    def refused(*options, lines, **more):
        failed(here(*words, "--resume", *options, lines=lines), 3, *more.values())
        assert out.read_bytes() == whole

    refused("--seed", 2, lines=LINES[:3], what="out.jsonl:1: was made from another line")
    refused("--seed", 1, "--top-k", 3, lines=LINES[:3], what="or with another model or settings")
    changed = [*LINES[:2], LINES[2] | {"id": "new"}]
    refused("--seed", 1, lines=changed, what="out.jsonl:3: was made from another line")
    refused("--seed", 1, lines=LINES[:2], what="out.jsonl:3: has no line to answer")
    out.write_bytes(whole := b'{"text": "hello"}\n' + whole)
    refused("--seed", 1, lines=LINES[:3], what="out.jsonl:1: is no line of a batch")
    whole = whole.split(b"\n", 1)[1]
    out.write_bytes(whole)
    assert here(*words, "--resume", "--seed", 1, lines=LINES).code == 0  # the input has grown


SEEDS = [-1, True, 1.0, 1e400, "1", None, [], 2**62 + 2, 0]  # of line 2


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_a_damaged_seed_is_said_with_its_place(here, tmp_path, seed):
    out = tmp_path / "out.jsonl"
    words = ["--batch", "in", "-o", "out", "--max-tokens", 1]
    assert here(*words, lines=[{"prompt": ""}, {"prompt": "x"}]).code == 3
    first, second = rows_of(out.read_text())
    assert "seed" not in first
    out.write_text(json.dumps(first) + "\n" + json.dumps(second | {"seed": seed}) + "\n")
    whole = out.read_bytes()
    failed(here(*words, "--resume"), 3, f"{out}:2: is no line of a batch")
    assert out.read_bytes() == whole


def test_an_overflow_is_said_in_the_words_of_a_line(here):
    words = ["--batch", "in", "--on-overflow", "left"]
    (row,) = rows_of(here(*words, lines=[{"prompt": "x", "max_tokens": 600}]).out)
    expected = "prompt of 1 token + max_tokens 600 > context 512; shorten one"
    assert row["error"] == {"message": expected, "exit_code": 6}


def test_one_process_writes_an_output(here, tmp_path):
    with (tmp_path / "out.jsonl").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        failed(here("--batch", "in", "-o", "out", "--force", lines=LINES), 2, "another process")


def test_an_output_is_not_emptied_before_it_is_this_process_s_own(here, tmp_path, monkeypatch):
    """Another process makes the output, and writes, while this one is about to."""
    out = tmp_path / "out.jsonl"

    def late(name, mode):
        out.write_text("an answer\n")
        others.append(out.open("r+"))
        fcntl.flock(others[-1], fcntl.LOCK_EX)
        return FileIO(name, mode)

    monkeypatch.setattr(batch_output, "FileIO", late)
    for words in ([], ["--force"], ["--resume"]):
        others = []
        failed(here("--batch", "in", "-o", "out", *words, lines=LINES), 2, "another process")
        assert out.read_text() == "an answer\n"
        others[0].close()
        out.unlink()


def test_the_input_is_never_the_output(place, tmp_path):
    """Neither by the shell's doing; a process of its own has standard input and output."""
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": "x", "max_tokens": 1}) + "\n")
    whole = file.read_bytes()
    for words, name in (
        (["--batch", "-", "-o", file, "--force"], str(file)),
        (["--batch", "-", "-o", file, "--resume"], str(file)),
        (["--batch", file], "standard output"),
        (["--batch", "-"], "standard output"),
    ):
        with file.open("rb") as stdin, file.open("ab") as stdout:
            result = subprocess.run(
                [sys.executable, "-m", "cli.main", "generate", "-m", "tiny", *map(str, words)],
                cwd=place,
                env=command_environment(tmp_path),
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith(f"error: {name}: is the input itself")
        assert result.stderr.count("\n") == 1 and file.read_bytes() == whole


def test_progress_is_a_line_now_and_then(here, monkeypatch):
    monkeypatch.setattr(batching, "SELDOM", 0)
    result = here("--batch", "in", "--max-tokens", 5, lines=LINES[:2])
    assert result.err.count("\n") > 3 and "\r" not in result.err
    assert here("--batch", "in", "--max-tokens", 5, "-q").err == ""


def started(place, tmp_path, *words):
    """Start a batch that takes a while, and wait for its first lines."""
    lines = "".join(json.dumps({"id": i, "prompt": f"def f{i}("}) + "\n" for i in range(400))
    (tmp_path / "in.jsonl").write_text(lines)
    words = ["generate", "-m", "tiny", "--batch", tmp_path / "in.jsonl", *words]
    words += ["-o", tmp_path / "out.jsonl", "--rows", "3", "--max-tokens", "40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *map(str, words)],
        cwd=place,
        env=command_environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    out, deadline = tmp_path / "out.jsonl", time.monotonic() + 60
    while not out.is_file() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_stopped_goes_on(here, place, tmp_path, how):
    process = started(place, tmp_path)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    written = (tmp_path / "out.jsonl").read_bytes()
    done = written.count(b"\n")
    assert 3 <= done < 400
    if how == signal.SIGINT:
        assert process.returncode == 130 and written.endswith(b"\n")
        assert f"stopped, {done} lines are written; the same command with --resume" in err.decode()
        assert "Traceback" not in err.decode()
    few = (tmp_path / "in.jsonl").read_text().splitlines(keepends=True)[: done + 5]
    (tmp_path / "in.jsonl").write_text("".join(few))
    assert here("--batch", "in", "-o", "out", "--max-tokens", 40, "--resume").code == 0
    found = rows_of((tmp_path / "out.jsonl").read_text())
    assert [row["id"] for row in found] == list(range(done + 5))
    base = found[0]["seed"]
    assert [row["seed"] for row in found] == [base + i for i in range(done + 5)]
    never_stopped = here("--batch", "in", "--max-tokens", 40, "--seed", base, "-q").out
    assert [row["text"] for row in rows_of(never_stopped)] == [row["text"] for row in found]
