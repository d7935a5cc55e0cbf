"""`lm count-tokens` as scripts, hooks and people use it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.counting import number_of_tokens
from cli.inputs import Reader
from engine.errors import RecipeError
from tests.cli.test_errors import failed
from tests.conftest import ROOT, TEXT, Result, command_environment

HELLO = "Hello, how are you today?"  # seven tokens in cl100k_base and in o200k_base
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there!"}]
PRICES = """
currency: USD
as_of: 2026-10-01
models:
  gpt-5: {input: 1.25, cached_input: 0.125, output: 10}
  gpt-4o: {input: 2.5, output: 10}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache for all tests: reading the ranks anew takes a second."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def lm(run, cache, monkeypatch):
    """Run `lm count-tokens`; it must end with `code`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def call(*words: object, stdin: bytes = b"", code: int = 0, cwd=None) -> Result:
        result = run("count-tokens", *words, stdin=stdin, cwd=cwd)
        assert result.code == code, result
        return result

    return call


def git(folder: Path, *words: str) -> None:
    """Run git; a machine without it skips the test."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        cwd=folder,
        check=True,
        capture_output=True,
        env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull},
    )


def lines(result: Result) -> list[list[str]]:
    return [line.split("\t") for line in result.out.splitlines()]


# What a pipe gets


def test_one_input_is_one_integer(lm, tmp_path):
    (tmp_path / "a.txt").write_text(HELLO)
    for words, stdin in ((["a.txt"], b""), (["--text", HELLO], b""), ([], HELLO.encode())):
        result = lm(*words, "-m", "gpt-4", stdin=stdin)
        assert result.out == "7\n" and result.err == ""
    assert lm("-", "-m", "cl100k_base", stdin=b"The weather today is").out == "4\n"


def test_the_default_model_is_said(lm):
    assert "gpt-5 (o200k_base, exact)" in lm("--text", "x").err
    assert lm("--text", "x", "-q").err == ""


def test_several_files_and_models_are_lines(lm, tmp_path):
    (tmp_path / "a").write_text(HELLO)
    (tmp_path / "b").write_text(HELLO * 2)
    assert lines(lm("a", "b", "-m", "gpt-4")) == [["7", "a"], ["14", "b"], ["21", "total"]]
    both = lm("a", "-m", "gpt-4,gpt-5", "-m", "gpt-4o")
    assert lines(both) == [["7", "gpt-4"], ["7", "gpt-5"], ["7", "gpt-4o"]]
    assert ["7", "gpt-4", "a"] in lines(lm("a", "b", "-m", "gpt-4,gpt-5"))


def test_names_of_models_are_stripped_and_never_empty(lm):
    both = lm("--text", HELLO, "-m", "gpt-5, gpt-4", "-m", "gpt-5,gpt-5")
    assert lines(both) == [["7", "gpt-5"], ["7", "gpt-4"]]
    for word in (",", "", " , "):
        failed(lm("--text", "x", "-m", word, code=2), 2, "names no model")


def test_names_cannot_steer_the_terminal_nor_fill_it(lm):
    """A model's name came back with its escape sequences; a long one ended in a traceback."""
    error = lm("--text", "x", "-m", "\x1b[31mred", code=2).err
    assert "\\x1b[31mred" in error and "\x1b" not in error
    long = "x" * 9000
    failed(lm("--text", "x", "-m", long, code=2), 2, "xxx")
    assert len(lm("--text", "x", "-m", long, code=2).err) < 1100


def test_an_estimate_is_never_naked(lm):
    result = lm("--text", TEXT, "-m", "claude-opus-4-1")
    assert re.search(r"claude-opus-4-1: estimated ± \d+ %", result.err)
    found = json.loads(lm("--text", TEXT, "-m", "claude-opus-4-1", "--json").out)["models"][0]
    assert found["class"] == "estimated" and found["low"] < found["tokens"] < found["high"]


def test_empty_input_is_nought(lm, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    for words in ([], ["empty"], ["--text", ""], ["folder"]):
        assert lm(*words).out == "0\n"


def test_names_with_odd_letters_stay_on_their_line(lm, tmp_path):
    (tmp_path / "a\nb").write_text("x")
    (tmp_path / os.fsdecode(b"\xff\x1b[31m")).write_text("x")
    shown = lm(".", "-m", "gpt-5")
    assert {name for _, name in lines(shown)} == {"a\\nb", "\\xff\\x1b[31m", "total"}
    names = [row["name"] for row in json.loads(lm(".", "--json").out)["inputs"]]
    assert sorted(names) == ["\\xff\x1b[31m", "a\nb"]


# What is counted


@given(st.binary(max_size=60), st.integers(1, 7))
def test_any_bytes_in_any_blocks_read_as_python_decodes_them(data, size):
    import io

    import cli.inputs

    before, cli.inputs.BLOCK = cli.inputs.BLOCK, size
    try:
        reader = Reader("x", io.BytesIO(data), refuse_binary=False)
        text = "".join(reader)
    finally:
        cli.inputs.BLOCK = before
    assert text == data.decode("utf-8", "replace") and reader.bytes == len(data)
    assert reader.replaced == text.count("\ufffd") - data.count("\ufffd".encode())


def test_a_long_stream_counts_as_the_whole(lm, tmp_path):
    text = (TEXT + "Grüße an 你好 👋\n") * 120
    (tmp_path / "long").write_text(text)
    assert len(text.encode()) > 1 << 20
    once = int(lm("--text", TEXT + "Grüße an 你好 👋\n").out)
    assert int(lm("long").out) == int(lm(stdin=text.encode()).out) == 120 * once


def test_many_files_at_once_count_as_one_by_one(lm, tmp_path):
    """Five megabytes in small files are counted in Rust by several threads."""
    (tmp_path / "d").mkdir()
    for number in range(24):
        (tmp_path / "d" / f"{number:02}").write_text(f"Grüße {number}\n" * 17_000)
    found = lines(lm("d"))[:-1]
    for number in (0, 7, 23):
        tokens, name = found[number]
        assert lm(name).out == f"{tokens}\n" and int(tokens) > 50_000
    assert len({tokens for tokens, _ in found}) <= 3


def test_bytes_that_are_not_utf8_are_counted_and_said(lm, tmp_path):
    (tmp_path / "bad").write_bytes(b"\xffa\x80")
    result = lm("bad")
    assert (
        result.out == lm("--text", "\ufffda\ufffd").out and "2 places are not UTF-8" in result.err
    )


def test_folders_are_read_as_git_sees_them(lm, tmp_path):
    git(tmp_path, "init", "-q")
    for name in ("kept.py", "new.py", "ignored.log", ".env", "sub/deep.py", "build/out.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("*.log\nbuild/\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    git(tmp_path, "add", "kept.py")
    found = json.loads(lm(".", "--json").out)
    assert [row["name"] for row in found["inputs"]] == ["kept.py", "new.py", "sub/deep.py"]
    assert found["left_out"] == {"hidden": [".env", ".gitignore"], "binary": ["picture.png"]}
    assert "1 binary (picture.png)" in lm(".").err
    everything = {row["name"] for row in json.loads(lm(".", "--all", "--json").out)["inputs"]}
    assert {".env", "ignored.log", "build/out.py", "kept.py"} <= everything
    # What is named is counted, ignored or not.
    assert len(lines(lm("build", "ignored.log"))) == 3


def repository(folder: Path, **files: str) -> None:
    """Make a repository with these files, all committed."""
    folder.mkdir(exist_ok=True)
    git(folder, "init", "-q")
    for name, text in files.items():
        (folder / name).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")


def counted(result: Result) -> set[str]:
    return {row["name"] for row in json.loads(result.out)["inputs"]}


def test_repositories_inside_of_a_folder_are_counted(lm, tmp_path):
    """Submodules and nested repositories were skipped without a word."""
    repository(tmp_path / "other", module="x")
    repository(tmp_path / "top", own="x")
    allowed = ["-c", "protocol.file.allow=always"]
    git(tmp_path / "top", *allowed, "submodule", "add", "-q", str(tmp_path / "other"), "sub")
    repository(tmp_path / "top" / "nested", inner="x", ignored="x")
    (tmp_path / "top" / "nested" / ".gitignore").write_text("log\n")
    (tmp_path / "top" / "nested" / "log").write_text("x")
    found = counted(lm("top", "--json"))
    assert found == {
        "top/.gitmodules",
        "top/own",
        "top/sub/module",
        "top/nested/inner",
        "top/nested/ignored",
    }
    assert "top/nested/log" in counted(lm("top", "--all", "--json"))


def test_tracked_hidden_files_count_and_git_itself_never(lm, tmp_path):
    (tmp_path / ".github").mkdir()
    (tmp_path / ".github" / "ci.yml").write_text("on: push\n")
    repository(tmp_path, a="x")
    (tmp_path / ".env").write_text("secret")
    assert counted(lm(".", "--json")) == {"a", ".github/ci.yml"}
    assert counted(lm(".", "--json", "--all")) == {"a", ".github/ci.yml", ".env"}
    assert "1 git's own (.git)" in lm(".", "--all").err


def test_ignored_files_without_a_repository_or_with_somebody_elses(lm, tmp_path, monkeypatch):
    """A .gitignore counted for nothing outside of a repository, and where git refused."""
    (tmp_path / ".gitignore").write_text("*.log\nbuild/\n")
    (tmp_path / "build").mkdir()
    for name in ("a", "a.log", "build/b"):
        (tmp_path / name).write_text("x")
    if shutil.which("git") is None:
        pytest.skip("needs git")
    assert counted(lm(".", "--json")) == {"a"}
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refused = subprocess.run(["git", "status"], cwd=tmp_path, capture_output=True, check=False)
    assert b"dubious ownership" in refused.stderr, "the control"
    assert counted(lm(".", "--json")) == {"a"}
    monkeypatch.setattr("cli.walking.git", lambda *_, **__: None)
    result = lm(".", "--json")
    assert counted(result) == {"a", "a.log", "build/b"} and "not honoured" in result.err


def test_a_hook_of_another_repository_changes_nothing(lm, tmp_path, monkeypatch):
    repository(tmp_path / "one", a="x")
    repository(tmp_path / "two", b="x")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "one" / ".git"))
    assert counted(lm("two", "--json")) == {"two/b"}


def test_patterns_follow_no_loops_and_take_nothing_ignored(lm, tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("*.log\n")
    for name in ("d/e/a.txt", "d/b.log", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("d/loop", "d/e/loop"):
        (tmp_path / name).symlink_to(tmp_path)
    os.mkfifo(tmp_path / "d" / "pipe.txt")
    result = lm("**/*", "--json")
    assert counted(result) == {"d/e/a.txt"}
    left_out = json.loads(result.out)["left_out"]
    assert left_out["git-ignored"] == ["d/b.log"] and left_out["no regular file"] == ["d/pipe.txt"]
    assert left_out["hidden"] == [".gitignore", ".hidden/c.txt"]
    assert counted(lm("d/*.log", "--json")) == {"d/b.log"}, "asked for by name"
    assert counted(lm(".hidden/**", "--json")) == {".hidden/c.txt"}


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device without end")
def test_devices_are_refused(lm):
    failed(lm("/dev/zero", code=3), 3, "/dev/zero: a device")
    assert lm("/dev/null").out == "0\n"


def test_utf_16_is_called_by_its_name(lm, tmp_path):
    (tmp_path / "a").write_text("Grüße", encoding="utf-16")
    failed(lm("a", code=3), 3, "UTF-16", "iconv")


def test_the_pipe_counts_once(lm):
    assert lm("-", "/dev/stdin", stdin=HELLO.encode()).out == "7\n"


def test_names_that_cannot_be_files(lm, tmp_path):
    """Each of them ended in a traceback, or counted this folder; now the file beside it counts."""
    (tmp_path / "a").write_text(HELLO)
    for name, said in (
        ("x" * 5000, "cannot be read"),
        ("~nosuchuser/x", "no such file"),
        ("", "an empty name"),
        ("nowhere", "no such file"),
        ("*.zip", "no file matches"),
    ):
        failed(lm(name, code=3), 3, said)
        result = lm("a", name, code=3)
        assert lines(result)[0] == ["7", "a"] and said in result.err


def test_a_folder_too_deep_does_not_stop_the_others(lm, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text(HELLO)
    before, depth = Path.cwd(), 25
    try:
        os.chdir(tmp_path / "d")
        for _ in range(depth):
            Path("n" * 200).mkdir()
            os.chdir("n" * 200)
        Path("deep").write_text("x")
    finally:
        os.chdir(before)
    for words in (["d"], ["d", "--all"]):
        result = lm(*words, code=3)
        assert lines(result)[0] == ["7", "d/a"] and "cannot be read" in result.err


def test_links_and_devices_in_folders_are_left_out_and_said(lm, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("x")
    (tmp_path / "d" / "loop").symlink_to(".")
    (tmp_path / "d" / "twin").symlink_to("a")
    os.mkfifo(tmp_path / "d" / "pipe")
    for words in (["d"], ["d", "--all"]):
        result = lm(*words)
        assert result.out == "1\n" and "2 links" in result.err
    assert "1 no regular file (d/pipe)" in result.err
    assert "named twice (d/twin)" in lm("d/a", "d/twin").err


def test_the_configuration_of_a_repository_runs_nothing(lm, tmp_path):
    """A repository from elsewhere may name programs for git to run."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / ".gitattributes").write_text("*.txt diff=evil filter=e=vil\n")
    repository(tmp_path / "sub", b="one")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    trap = f"touch {tmp_path}/ran; cat"
    for key in ("core.fsmonitor", "diff.external", "diff.evil.textconv", "diff.evil.command"):
        git(tmp_path, "config", key, trap)
    for key in ("filter.e=vil.clean", "filter.e=vil.process"):
        git(tmp_path, "config", key, trap)
    git(tmp_path, "config", "filter.e=vil.required", "true")
    git(tmp_path / "sub", "config", "core.fsmonitor", trap)
    hook = tmp_path / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{trap}\n")
    hook.chmod(0o755)
    (tmp_path / "a.txt").write_text("two\n")
    (tmp_path / "sub" / "b").write_text("two")
    os.utime(tmp_path / ".gitattributes")
    lm(".")
    assert "added" in lm("--git-diff", "HEAD", "--json").out
    assert not (tmp_path / "ran").exists()
    subprocess.run(["git", "diff", "HEAD"], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "ran").exists(), "the control"


def test_the_filters_of_the_user_stay(lm, tmp_path, monkeypatch):
    repository(tmp_path, **{".gitattributes": "*.txt filter=upper\n"})
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "user").write_text('[filter "upper"]\n\tclean = tr a-z A-Z\n')
    git(tmp_path, "add", "-N", "a.txt")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "user"))
    upper = lm("--git-diff", "HEAD", "-m", "gpt-5").out
    git(tmp_path, "config", "filter.upper.clean", "rm -rf .")
    assert (tmp_path / "a.txt").exists() and lm("--git-diff", "HEAD", "-m", "gpt-5").out != upper


def test_the_diff_of_the_index_and_bytes_in_it(lm, tmp_path):
    repository(tmp_path, a="one\n")
    (tmp_path / "a").write_bytes(b"caf\xe9\n")
    assert lm("--git-diff", "--staged").out == "0\n"
    assert "1 place is not UTF-8" in lm("--git-diff", "HEAD").err
    git(tmp_path, "add", "a")
    (tmp_path / "a").write_text("later\n")
    row = json.loads(lm("--git-diff", "--staged", "--json", "-m", "gpt-5").out)["inputs"][0]
    assert row["added"]["gpt-5"] == int(lm(stdin=b"caf\xe9\n").out)
    assert lm("--git-diff=--cached").out == lm("--git-diff", "--staged").out


def test_globs_and_names_that_lead_nowhere(lm, tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("a.py", "src/b.py", "src/c.md"):
        (tmp_path / name).write_text("x")
    assert [row[1] for row in lines(lm("**/*.py"))] == ["a.py", "src/b.py", "total"]
    failed(lm("*.zip", code=3), 3, "no file matches")
    failed(lm("nowhere", code=3), 3, "nowhere", "no such file")
    (tmp_path / "b").write_bytes(b"\0")
    failed(lm("b", code=3), 3, "b: a binary file")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that refuses")
def test_an_unreadable_file_does_not_stop_the_others(lm, tmp_path):
    """The first page of a process's memory refuses to be read, by anybody."""
    (tmp_path / "a").write_text(HELLO)
    result = lm("a", "/proc/self/mem", code=3)
    assert lines(result) == [["7", "a"], ["7", "total"]]
    assert "error: /proc/self/mem: cannot be read" in result.err
    failed(lm("/proc/self/mem", code=3), 3, "cannot be read")


def test_a_diff_by_file(lm, tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a b.py").write_text("one = 1\n")
    (tmp_path / "c.py").write_text("two = 2\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    (tmp_path / "a b.py").write_text("one = 1\n-- three\n")
    (tmp_path / "c.py").unlink()
    text = subprocess.run(["git", "diff", "HEAD"], cwd=tmp_path, capture_output=True, check=True)
    found = json.loads(lm("--git-diff", "HEAD", "--json", "-m", "gpt-5").out)
    assert found["models"][0]["tokens"] == int(lm(stdin=text.stdout).out)
    first, second = found["inputs"]
    assert (first["name"], second["name"]) == ("a b.py", "c.py")
    assert first["added"]["gpt-5"] == int(lm("--text", "-- three\n").out) > 0
    assert first["removed"]["gpt-5"] == 0 < second["removed"]["gpt-5"]
    git(tmp_path, "checkout", "-q", ".")
    assert lm("--git-diff", "HEAD").out == "0\n"
    failed(lm("--git-diff", "nothing", code=2), 2, "nothing")
    failed(lm("--git-diff=--output=x", code=2), 2, "not a revision")


def test_special_looking_text(lm, tmp_path):
    text = "a<|endoftext|>b"
    plain = lm("--text", text, "-m", "gpt-5")
    assert int(plain.out) > 3 and "1 special-looking span" in plain.err
    assert lm("--text", text, "--special", "parse").out == "3\n"
    failed(lm("--text", text, "--special", "error", code=3), 3, "<|endoftext|>")
    (tmp_path / "long").write_text("x" * ((1 << 20) - 5) + "<|endoftext|>" * 3)
    assert "3 special-looking spans" in lm("long").err, "one lies across two blocks"


# Conversations


def test_conversations_by_the_published_frame(lm, tmp_path):
    """Fifteen and seventeen tokens, the figures of AgentOps-AI/tokencost for these messages."""
    named = [{**CHAT[0], "name": "John"}, CHAT[1]]
    (tmp_path / "r.jsonl").write_text(json.dumps(CHAT) + "\n" + json.dumps({"messages": named}))
    assert lm("--chat", "r.jsonl", "-m", "gpt-4").out == "32\n"
    rows = [json.loads(line) for line in lm("--chat", "r.jsonl", "--jsonl").out.splitlines()]
    assert [row["tokens"]["gpt-5"] for row in rows] == [15, 17]
    model = json.loads(lm("--chat", "r.jsonl", "--json").out)["models"][0]
    assert model["class"] == "frame rule"
    assert sum(part["tokens"] for part in model["parts"]) == model["tokens"]
    (tmp_path / "one.json").write_text(json.dumps({"messages": CHAT}, indent=2))
    assert lm("--chat", "one.json").out == "15\n"


def test_what_is_not_known_of_a_conversation_is_said(lm, tmp_path):
    picture = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    (tmp_path / "r").write_text(json.dumps([{"role": "user", "content": [picture]}]))
    result = lm("--chat", "r", "-m", "gpt-4o")
    assert "at least" in result.err and "images" in result.err
    parts = json.loads(lm("--chat", "r", "--json", "-m", "gpt-4o").out)["models"][0]["parts"]
    assert {"part": "images", "tokens": None, "class": "unknown"} in parts
    cost = json.loads(lm("--chat", "r", "--json", "-m", "gpt-4o", "--cost").out)["costs"][0]
    assert cost["not_counted"] == ["images"]


def picture_of(side: int) -> dict:
    """A message with a picture of a size that a model of 512-pixel tiles can tell."""
    import base64
    import struct

    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", side, side)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def test_a_lower_bound_never_passes_as_an_answer(lm, tmp_path):
    """Regression: an unknown picture was 0 tokens, quietly, and passed every budget."""
    (tmp_path / "r").write_text(json.dumps([picture_of(100)]))
    result = lm("--chat", "r", "-m", "claude-opus-4-8", "-q")
    assert result.out == "0\n" and "at least" in result.err and "images" in result.err
    gate = lm("--chat", "r", "-m", "claude-opus-4-8", "-q", "--budget", 100, code=6)
    assert "cannot be known" in gate.err and "images" in gate.err
    model = json.loads(lm("--chat", "r", "-m", "claude-opus-4-8", "--json").out)["models"][0]
    assert model["class"] == "unknown" and model["high"] is None and model["fits"] is None
    # The control: the same picture for a model whose rule is published.
    assert lm("--chat", "r", "-m", "gpt-4o", "--budget", 300).err == ""
    model = json.loads(lm("--chat", "r", "-m", "gpt-4o", "--json").out)["models"][0]
    assert model["high"] == 85 + 170 + 3 + 1 + 3 and model["fits"] is True


def test_a_typo_in_a_request_is_named(lm, tmp_path):
    (tmp_path / "r").write_text(json.dumps([{"role": "user", "contnt": "hi"}]))
    result = lm("--chat", "r", "-q")
    assert "at least" in result.err and '"contnt"' in result.err
    assert '"contnt"' in lm("--chat", "r", "--budget", 10**6, "-q", code=6).err


def test_requests_say_their_model(lm, tmp_path):
    line = json.dumps({"model": "gpt-4", "instructions": HELLO, "input": "Hello"})
    (tmp_path / "r").write_text(f"{line}\n{line}\n")
    result = lm("--chat", "r", "--json")
    assert "for gpt-4 (exact), as the requests say" in result.err
    assert [m["model"] for m in json.loads(result.out)["models"]] == ["gpt-4"]
    assert (
        json.loads(lm("--chat", "r", "-m", "gpt-5", "--json").out)["models"][0]["model"] == "gpt-5"
    )
    (tmp_path / "r").write_text(line + "\n" + line.replace("gpt-4", "gpt-4o"))
    failed(lm("--chat", "r", code=2), 2, "several models (gpt-4, gpt-4o)", "-m")
    (tmp_path / "r").write_text(line.replace("gpt-4", "mystery"))
    failed(lm("--chat", "r", code=2), 2, "mystery", "-m")


def test_each_line_of_a_conversation_has_its_own_class(lm, tmp_path):
    """Regression: one line with a picture made every line unknown."""
    rows = [CHAT, [picture_of(100)]]
    (tmp_path / "r").write_text("\n".join(map(json.dumps, rows)))
    words = ["--chat", "r", "-m", "gpt-4.5-preview,claude-opus-4-8", "--jsonl"]
    first, second = (json.loads(line) for line in lm(*words).out.splitlines())
    assert (
        first["class"]["gpt-4.5-preview"] == "frame rule" and first["high"]["gpt-4.5-preview"] == 15
    )
    assert second["class"]["gpt-4.5-preview"] == "estimated"
    assert second["class"]["claude-opus-4-8"] == "unknown"
    assert second["high"]["claude-opus-4-8"] is None and second["low"]["claude-opus-4-8"] == 0
    for option in (["--by", "ext"], ["--top", 1]):
        failed(lm("--chat", "r", *option, code=2), 2, "--chat")


def test_a_checkpoint_counts_with_its_own_template(lm, tmp_path, tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    folder = tmp_path / "checkpoints" / "mine"
    folder.mkdir(parents=True)
    tokenizer.save(folder, 64)
    (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "r").write_text(json.dumps(CHAT))
    model = json.loads(lm("--chat", "r", "-m", "mine", "--json").out)["models"][0]
    words = "".join(f"\x00{m['role']}\n{m['content']}\x00\n" for m in CHAT).split("\x00")
    assert model["tokens"] == 4 + sum(len(tokenizer.encode(word)) for word in words)
    assert model["class"] == "exact"


def test_templates_read_every_shape_of_tools(lm, tmp_path, tokenizer):
    """Regression: a template reads tool.function.parameters, and saw nothing of other shapes."""
    template = (
        "{% for t in tools or [] %}{{ t.function.name }} {{ t.function.parameters | tojson }}"
        "{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    folder = tmp_path / "checkpoints" / "mine"
    folder.mkdir(parents=True)
    tokenizer.save(folder, 64)
    (folder / "chat_template.jinja").write_text(template)
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}

    def count(**request):
        (tmp_path / "r").write_text(json.dumps({"messages": CHAT, **request}))
        return json.loads(lm("--chat", "r", "-m", "mine", "--json").out)["models"][0]

    function = {"name": "f", "parameters": schema}
    whole = count(tools=[{"type": "function", "function": function}])
    assert whole["tokens"] > count()["tokens"] + 20 and whole["class"] == "exact"
    for other in (
        {"tools": [{"name": "f", "input_schema": schema}]},
        {"tools": [{"type": "function", **function}]},
        {"functions": [function]},
    ):
        assert count(**other)["tokens"] == whole["tokens"]
    assert count(system="be brief")["tokens"] > count()["tokens"]
    formats = count(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert formats["class"] == "unknown" and formats["high"] is None


def test_bad_conversations_name_their_line(lm, tmp_path):
    (tmp_path / "r").write_text(json.dumps(CHAT) + "\n\n[{}]\n")
    failed(lm("--chat", "r", code=3), 3, "r:3", 'no "role"')
    (tmp_path / "r").write_text(json.dumps(CHAT) + "\n{]\n")
    failed(lm("--chat", "r", code=3), 3, "r:2", "not valid JSON")
    (tmp_path / "r").write_text("[" * 100_000)
    failed(lm("--chat", "r", code=3), 3, "r:1", "not valid JSON")


# Money


@pytest.fixture
def prices(tmp_path) -> list[object]:
    (tmp_path / "prices.yaml").write_text(PRICES)
    return ["--price-file", "prices.yaml"]


def test_costs_by_hand_the_cheapest_first(lm, prices):
    words = ["--text", HELLO, "-m", "gpt-4o,gpt-5", "--cost", "--output-tokens", "1k", *prices]
    result = lm(*words)
    assert [(row[0], Decimal(row[1]), row[2]) for row in lines(result)] == [
        ("7", Decimal("0.01000875"), "gpt-5"),
        ("7", Decimal("0.0100175"), "gpt-4o"),
    ]
    assert "prices.yaml" in result.err and "2026-10-01" in result.err
    cached = json.loads(lm(*words, "--cached", 5, "--json").out)["costs"][0]
    assert {line["kind"]: line["tokens"] for line in cached["lines"]} == {
        "input": 2,
        "cached_input": 5,
        "output": 1000,
    }
    assert cached["total_usd"] == "0.010003125"


def test_a_model_too_small_comes_after_those_that_fit(lm):
    rows = lines(lm("--text", "hello " * 9000, "-m", "gpt-4,gpt-4o", "--cost"))
    assert [row[2:] for row in rows] == [["gpt-4o"], ["gpt-4", "does not fit"]]


def test_each_request_is_priced_alone(lm, tmp_path, prices):
    (tmp_path / "r").write_text((json.dumps(CHAT) + "\n") * 3)
    words = ["--chat", "r", "-m", "gpt-5", "--cost", "--output-tokens", 100, "--json", *prices]
    cost = json.loads(lm(*words).out)["costs"][0]
    assert cost["requests"] == 3 and cost["input_tokens"] == 45
    assert Decimal(cost["total_usd"]) == (45 * Decimal("1.25") + 300 * 10) / 10**6


def test_reported_usage_bills_cached_tokens_once(lm, tmp_path, prices):
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 800},
    }
    answer = {"model": "gpt-5", "usage": usage}
    (tmp_path / "u.jsonl").write_text(
        json.dumps(answer) + "\n" + json.dumps({"response": {"body": answer}}) + "\n"
    )
    once = (200 * Decimal("1.25") + 800 * Decimal("0.125") + 100 * 10) / 10**6
    [[tokens, dollars, model]] = lines(lm("--usage", "u.jsonl", *prices))
    assert (tokens, Decimal(dollars), model) == ("2000", 2 * once, "gpt-5")
    (tmp_path / "bare.json").write_text(json.dumps(usage, indent=1))
    assert Decimal(lines(lm("--usage", "bare.json", "-m", "gpt-5", *prices))[0][1]) == once
    failed(lm("--usage", "bare.json", *prices, code=3), 3, 'names no "model"')


def test_a_price_of_an_estimate_is_a_range(lm, prices, tmp_path):
    (tmp_path / "p.yaml").write_text(
        "currency: USD\nas_of: 2026-10-01\nmodels:\n  claude-sonnet-4-5: {input: 3, output: 15,"
        " context_window: 150, tiers: [{above: 100, input: 6, output: 22}]}\n"
    )
    text = "hello " * 84  # 110 tokens, between 82 and 138
    words = ["--text", text, "-m", "claude-sonnet-4-5", "--cost", "--price-file", "p.yaml"]
    cost = json.loads(lm(*words, "--json").out)["costs"][0]
    tokens = cost["input_tokens"]
    low, high = round(0.75 * tokens), round(1.25 * tokens)
    assert low < 100 < high
    assert Decimal(cost["low_usd"]) == low * Decimal(3) / 10**6
    assert Decimal(cost["high_usd"]) == high * Decimal(6) / 10**6
    assert "the estimate crosses a price tier" in cost["notes"] and len(cost["tiers"]) == 2
    assert cost["fits"] is True and cost["context_window"] == 150, "the price file's window"
    result = lm(*words, "--output-tokens", 40)
    assert lines(result)[0][2:] == ["claude-sonnet-4-5", "may not fit"] and " to 0.0" in result.err
    failed_words = lm(*words, "--output-tokens", 140, code=6)
    assert lines(failed_words)[0][3] == "does not fit" and "no model is large" in failed_words.err


def test_the_input_of_gpt5_is_smaller_than_its_context(lm):
    for tokens, fits in ((272_000, True), (272_001, False)):
        found = lm("-m", "gpt-5", "--json", stdin=b" hello" * tokens)
        model = json.loads(found.out)["models"][0]
        assert (model["tokens"], model["fits"]) == (tokens, fits)


def test_an_estimate_that_may_not_fit_says_so(lm):
    for tokens, fits in ((100_000, True), (150_000, None), (210_000, False)):
        result = lm("-m", "claude-3-5-sonnet", "--json", stdin=b" hello" * tokens)
        model = json.loads(result.out)["models"][0]
        assert model["fits"] is fits and model["tokens"] == round(1.3 * tokens)
        assert ("may not fit its 200,000" in result.err) == (fits is None)


def test_more_cached_than_there_is_is_refused(lm, prices):
    words = ["--text", HELLO, "-m", "gpt-5", "--cost", *prices]
    failed(lm(*words, "--cached", 8, code=2), 2, "8 tokens", "only 7")
    failed(lm(*words, "--cached", 4, "--cache-write", 4, code=2), 2, "only 7")
    failed(lm(*words, "--reasoning", 4, "--output-tokens", 3, code=2), 2, "a part")
    more = ["--cached", 3, "--cache-write", 2, "--output-tokens", 10, "--reasoning", 4, "--json"]
    found = json.loads(lm(*words, *more).out)["costs"][0]
    kinds = {line["kind"]: line["tokens"] for line in found["lines"]}
    assert kinds == {"input": 2, "cached_input": 3, "cache_write": 2, "output": 6, "reasoning": 4}


def test_a_stream_as_it_came_over_the_wire(lm, tmp_path, prices):
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    chunk = {"id": "c", "object": "chat.completion.chunk", "model": "gpt-5", "usage": None}
    events = [chunk, chunk | {"usage": usage}]
    wire = "".join(f"event: x\ndata: {json.dumps(event)}\n\n" for event in events)
    (tmp_path / "sse").write_text(f": hello\n{wire}data: [DONE]\n")
    (tmp_path / "bare").write_text("\n".join(map(json.dumps, events)))
    for name in ("sse", "bare"):
        result = lm("--usage", name, *prices)
        assert Decimal(lines(result)[0][1]) == (1000 * Decimal("1.25") + 100 * 10) / 10**6
        assert "skipped: 1 events" in result.err
    both = lm("--usage", "sse", "--usage", "sse", "--usage", "bare", *prices, "--json")
    assert json.loads(both.out)["costs"][0]["requests"] == 1, "one answer, three times the same id"
    (tmp_path / "null").write_text('{"model": "gpt-5", "usage": {"prompt_tokens": 3}}')
    failed(lm("--usage", "null", *prices, code=3), 3, "null:1", "missing or null")
    (tmp_path / "none").write_text(json.dumps(chunk))
    failed(lm("--usage", "none", *prices, code=3), 3, "holds no usage", "skipped: 1")
    failed(lm("--usage", "sse", "-m", "gpt-5,o3", *prices, code=2), 2, "one -m")


def test_how_it_was_served_decides_the_price(lm, tmp_path, prices):
    """Regression: flex, priority and batch were all billed as standard."""
    usage = {"prompt_tokens": 10**6, "completion_tokens": 0}

    def cost(served, *more, model="gpt-5"):
        answer = {"model": model, "service_tier": served, "usage": usage}
        (tmp_path / "u").write_text(json.dumps(answer))
        return json.loads(lm("--usage", "u", "--json", *more).out)["costs"][0]

    assert cost("flex", *prices)["class"] == "unknown rate"
    assert any("flex" in note for note in cost("flex", *prices)["notes"])
    assert cost("default", *prices)["class"] == "exact"
    pytest.importorskip("genai_prices")
    at = ["--at", "2026-11-20"]
    dollars = [Decimal(cost(s, *at)["total_usd"]) for s in ("flex", "default", "priority", "batch")]
    assert dollars == [Decimal("0.625"), Decimal("1.25"), Decimal("2.5"), Decimal("0.625")]
    assert cost("batch", "--batch", *at)["total_usd"] == cost("batch", *at)["total_usd"]
    assert cost("odd", *at)["class"] == "unknown rate"


# Limits


@pytest.mark.parametrize(
    ("word", "number"),
    [("8000", 8000), ("200_000", 200_000), ("128k", 128_000), ("4K", 4096), ("1.5k", 1500)],
)
def test_numbers_of_tokens(word, number):
    assert number_of_tokens(word, "--budget") == number
    with pytest.raises(RecipeError, match="--budget"):
        number_of_tokens(word + "x", "--budget")


@pytest.mark.parametrize("word", ["", "1,5k", "1,50", "12,3456", "9" * 400, "1_", "٣", "-1", "k"])
def test_what_is_no_number_of_tokens_is_refused(word):
    with pytest.raises(RecipeError, match="--budget"):
        number_of_tokens(word, "--budget")
    assert number_of_tokens("1,500,000", "--budget") == 1_500_000, "the control"


def test_a_budget_is_a_gate(lm, tmp_path):
    (tmp_path / "a").write_text(HELLO)
    (tmp_path / "b").write_text(HELLO * 3)
    assert lm("a", "b", "--budget", 28).out.endswith("28\ttotal\n")
    over = lm("a", "b", "--budget", 27, code=6)
    assert over.out.endswith("28\ttotal\n"), "the answer is there all the same"
    assert "1 over the budget of 27" in over.err and "b 21, a 7" in over.err
    # An estimate is held to its upper end.
    tokens = int(lm("b", "-m", "claude-opus-4-1").out)
    assert "up to" in lm("b", "-m", "claude-opus-4-1", "--budget", tokens, code=6).err


@pytest.mark.parametrize("strategy", ["head", "tail", "middle"])
def test_what_is_cut_counts_at_most_the_limit(lm, strategy):
    text = ("Grüße an 你好 👋🏽 internationalisation, " * 20).encode()
    for limit in (1, 7, 50, 10_000):
        words = ["-", "--fit-to", limit, "--strategy", strategy, "-m", "gpt-5", "-q"]
        kept = lm(*words, stdin=text).out.encode()
        assert int(lm(stdin=kept).out) <= limit
        assert kept == text or (limit < 10_000 and len(kept) < len(text))


def test_a_cut_by_an_estimate_keeps_to_its_upper_end(lm):
    words = ["-", "--fit-to", 100, "-m", "claude-opus-4-1"]
    result = lm(*words, stdin=TEXT.encode())
    assert "≈" in result.err and "estimated ±" in result.err
    cut = json.loads(lm(*words, "--json", stdin=TEXT.encode()).out)
    assert cut["class"] == "estimated" and 90 < cut["high"] <= 100 and cut["text"] == result.out
    chunks = lm("-", "--split", 100, "-m", "claude-opus-4-1", stdin=TEXT.encode())
    assert "estimated ±" in chunks.err
    for line in chunks.out.splitlines():
        assert json.loads(line)["tokens"] * 1.25 <= 101


def test_a_split_that_fails_leaves_nothing(lm, tmp_path):
    (tmp_path / "a").write_text("plain words, then one that is too long: 👩‍👩‍👧‍👦🏽")
    failed(lm("a", "--split", 1, "-o", "new/parts", code=2), 2, "cannot")
    assert [path.name for path in tmp_path.iterdir()] in (["a"], ["a", "cache"], ["cache", "a"])


def test_chunks_cover_the_text(lm, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    result = lm("book.txt", "--split", 100, "-o", "parts")
    assert result.out == "parts\n"
    parts = sorted((tmp_path / "parts").iterdir())
    assert parts[0].name == "book-0001.txt" and len(parts) > 5
    assert "".join(part.read_text() for part in parts) == TEXT
    assert all(int(row[0]) <= 100 for row in lines(lm("parts"))[:-1])
    failed(lm("book.txt", "--split", 100, "-o", "parts", code=2), 2, "not empty")
    rows = [json.loads(line) for line in lm("book.txt", "--split", "100").out.splitlines()]
    assert [row["text"] for row in rows] == [part.read_text() for part in parts]


def test_nothing_that_is_asked_is_ignored(lm):
    for words, said in (
        (["--chat", "r", "--fit-to", 5], "--fit-to and --chat"),
        (["--text", "x", "--split", 5, "--budget", 5], "--split and --budget"),
        (["--usage", "u", "--by", "ext"], "--usage and --by"),
        (["--text", "x", "--cached", 5], "--cached does nothing without --cost"),
        (["--text", "x", "-o", "there"], "-o does nothing without --split"),
        (["--chat", "r", "--special", "parse"], "--special and --chat"),
        (["--text", "x", "--json", "--jsonl"], "--json and --jsonl"),
        (["--text", "x", "--strategy", "tail"], "--strategy does nothing without --fit-to"),
        (["--text", "x", "--all"], "--all and --text"),
        (["--text", "x", "--by", "ext", "--jsonl"], "--by and --jsonl"),
        (["--text", "x", "--top", 3, "--cost"], "--top does nothing with --cost"),
        (["--text", "x", "--split", 3, "-o", "d", "--json"], "-o and --json"),
        (["--text", "x", "--fit-to", ""], "--fit-to"),
        (["--text", "x", "--split", ""], "--split"),
        (["--git-diff", ""], "--git-diff"),
    ):
        failed(lm(*words, code=2), 2, said)


def test_what_does_not_go_together(lm):
    failed(lm("--text", "x", "--chat", "y", code=2), 2, "--text and --chat")
    failed(lm("--text", "x", "--fit-to", 5, "-m", "gpt-4,gpt-5", code=2), 2, "one -m")
    failed(lm("--text", "x", "-m", "gtp-5", code=2), 2, "gpt-5")
    failed(lm("--text", "x", "--split", 5, "--overlap", 5, code=2), 2, "overlap")


# The table, the process


def test_groups_and_the_largest(lm, tmp_path):
    for name in ("a/x.py", "a/y.md", "b/z.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(HELLO)
    assert lines(lm(".", "--by", "ext")) == [["14", ".py"], ["7", ".md"], ["21", "total"]]
    assert lines(lm(".", "--by", "folder"))[0] == ["14", "a"]
    assert lines(lm(".", "--top", 1))[1:] == [["14", "(2 more)"], ["21", "total"]]


def on_a_terminal(folder: Path, cache: Path, *words: str) -> str:
    """Return what a terminal of 80 columns shows."""
    import pty

    controller, terminal = pty.openpty()
    environment = command_environment(folder) | {"XDG_CACHE_HOME": str(cache), "TERM": "xterm"}
    command = [sys.executable, "-m", "cli.main", "count-tokens", *words]
    with subprocess.Popen(
        command, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ):
        os.close(terminal)
        shown = b""
        while True:
            try:
                block = os.read(controller, 4096)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not block:
                break
            shown += block
    os.close(controller)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")


def test_a_table_on_a_terminal_keeps_to_its_width(cache, tmp_path):
    (tmp_path / ("long" * 30 + ".py")).write_text(HELLO)
    (tmp_path / "b[bold].py").write_text(HELLO)
    shown = on_a_terminal(tmp_path, cache, ".", "-m", "gpt-5,gpt-4,claude-opus-4-1")
    assert max(map(len, shown.splitlines())) <= 80, shown
    for part in ("o200k_base", "cl100k_base", "estimated ±", "b[bold].py", "50.0 %", "total"):
        assert part in shown, shown
    shown = on_a_terminal(tmp_path, cache, "b[bold].py", "-m", "gpt-5,gpt-4", "--cost")
    assert "exact" in shown and "USD" in shown and "prices:" in shown


def test_a_narrow_terminal_cuts_no_digits(cache, tmp_path, monkeypatch):
    """Regression: five models on 80 columns, or two on 24, showed beginnings of numbers."""
    (tmp_path / "a.txt").write_text("hello " * 12_345)
    (tmp_path / "b.txt").write_text("hello " * 6_789)
    shown = on_a_terminal(
        tmp_path, cache, ".", "-m", "gpt-5,gpt-4,claude-opus-4-1,gpt-4o,gemini-2.5-pro"
    )
    assert shown.count("12,34") >= 2 and "≈ 16,0" in shown, shown
    columns = command_environment(tmp_path) | {"COLUMNS": "24"}
    monkeypatch.setattr("tests.cli.test_count_tokens.command_environment", lambda _: columns)
    shown = on_a_terminal(tmp_path, cache, "a.txt", "-m", "gpt-5,gpt-4o", "--cost")
    assert "of context: 4.5 %" in shown or "of context: 3.1 %" in shown, shown


def test_a_lower_bound_on_a_terminal(cache, tmp_path):
    (tmp_path / "r").write_text(json.dumps([picture_of(100)]))
    words = ["--chat", "r", "-m", "claude-opus-4-8", "--cost", "--output-tokens", "9"]
    shown = on_a_terminal(tmp_path, cache, *words)
    assert "≥ ≈ 0" in shown and "at least" in shown and "may not fit" in shown, shown
    assert "≥" not in on_a_terminal(tmp_path, cache, *words[:3], "gpt-4o", *words[4:])


def test_costs_on_a_terminal_show_every_kind_that_is_billed(cache, tmp_path):
    (tmp_path / "prices.yaml").write_text(PRICES)
    (tmp_path / "a").write_text(HELLO)
    words = ["a", "-m", "gpt-5", "--cost", "--price-file", "prices.yaml", "--cached", "3"]
    shown = on_a_terminal(tmp_path, cache, *words, "--cache-write", "2", "--output-tokens", "9")
    for part in ("cached", "written", "output"):
        assert part in shown, shown
    assert "reasoning" not in shown
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    answers = [{"model": model, "usage": usage} for model in ("gpt-5", "gpt-4o")]
    (tmp_path / "u").write_text("\n".join(map(json.dumps, answers)))
    shown = on_a_terminal(tmp_path, cache, "--usage", "u", "--price-file", "prices.yaml")
    assert "0.005750 USD in all, for 2,000 tokens read and 200 written" in shown, shown
    assert "fit" not in shown


def process(folder: Path, cache: Path, words: list[str], **options):
    return subprocess.run(
        [sys.executable, "-m", "cli.main", "count-tokens", *words],
        cwd=folder,
        env=command_environment(folder) | {"XDG_CACHE_HOME": str(cache)},
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        **options,
    )


def test_nobody_reads_or_the_disk_is_full(cache, tmp_path):
    (tmp_path / "a").write_text(HELLO)
    reader, writer = os.pipe()
    os.close(reader)
    ended = process(tmp_path, cache, ["a", "-q"], stdout=writer)
    os.close(writer)
    assert ended.returncode == 141 and ended.stderr == b""
    if Path("/dev/full").exists():
        with Path("/dev/full").open("wb") as full:
            ended = process(tmp_path, cache, ["a", "-q"], stdout=full)
        assert ended.returncode == 4 and b"No space left" in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk_for_talk_changes_no_exit_code(cache, tmp_path):
    with Path("/dev/full").open("wb") as full:
        assert process(tmp_path, cache, ["-h"], stdout=full).returncode == 4
    for words, code in (("nosuch", 3), ("--text x", 0)):
        command = f"{shlex.quote(sys.executable)} -m cli.main count-tokens {words} 2>/dev/full"
        environment = command_environment(tmp_path) | {"XDG_CACHE_HOME": str(cache)}
        ended = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert ended.returncode == code


def test_counting_is_cold_and_opens_no_socket(cache, tmp_path):
    """In a process of its own, where a socket is an error; the control wants a price."""
    (tmp_path / "a").write_text(HELLO)
    probe = (
        "import socket, sys\n"
        "class Refusing(socket.socket):\n"
        "    def __init__(self, *a, **k): raise AssertionError('a socket')\n"
        "socket.socket = Refusing\n"
        "from cli.main import main\n"
        "try: main(['count-tokens', 'a', *sys.argv[1:]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'tokenizers', 'genai_prices', 'regex'}\n"
        "try: socket.create_connection(('127.0.0.1', 9))\n"
        "except AssertionError: print('sockets are refused')\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
    )
    environment = command_environment(tmp_path) | {"XDG_CACHE_HOME": str(cache)}
    for words, loaded in (([], "[]"), (["--cost"], "'genai_prices'")):
        ended = subprocess.run(
            [sys.executable, "-c", probe, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert loaded in ended.stdout.splitlines()[-1]
        assert "sockets are refused" in ended.stdout, "the control"


# The documents


def gallery() -> list[str]:
    """The commands of the README's section on counting."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Counting tokens")[1]
    rows = section.split("```sh\n")[1].split("```")[0].splitlines()
    return [re.sub(r"\s{2,}#.*| # .*", "", row) for row in rows]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A small project with everything that the gallery names."""
    folder = tmp_path_factory.mktemp("project")
    git(folder, "init", "-q")
    for name in ("src", "docs", "bin"):
        (folder / name).mkdir()
    for name in ("prompt.md", "AGENTS.md", "src/a.py", "docs/a.md"):
        (folder / name).write_text(f"# {name}\n{HELLO}\n")
    (folder / "book.txt").write_text(TEXT)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    (folder / "src/a.py").write_text("changed = True\n")
    (folder / "requests.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    (folder / "answers.jsonl").write_text(json.dumps({"model": "gpt-5", "usage": usage}) + "\n")
    lm = folder / "bin" / "lm"
    lm.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cli.main "$@"\n')
    lm.chmod(0o755)
    return folder


@pytest.mark.parametrize("line", gallery())
def test_the_gallery_runs(line, project, cache):
    shutil.rmtree(project / "parts", ignore_errors=True)
    environment = command_environment(project) | {"XDG_CACHE_HOME": str(cache)}
    environment["PATH"] = f"{project / 'bin'}:{environment['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode in ((0, 141) if "| head" in line else (0,)), ended
    assert ended.stdout and "Traceback" not in ended.stderr
    if "head -1" in line:
        assert ended.stdout.split()[2] == "gpt-5-mini"


def test_the_gallery_shows_what_it_should():
    text = "\n".join(gallery())
    for part in (
        "git diff | lm",
        "--budget",
        "--split",
        "--usage",
        "--chat",
        "head -1",
        "--compare",
    ):
        assert part in text
    assert len(gallery()) > 9
