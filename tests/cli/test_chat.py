"""Chat: line by line through a pipe, and at a real terminal with its keys."""

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.checkpoint import load_model
from engine.config import SampleConfig
from engine.generate.reference import TorchDecoder
from engine.generate.session import Session
from engine.text.renderer import Renderer
from tests.cli.test_errors import failed
from tests.conftest import command_environment
from tests.engine.interop.folders import imported, write_folder

GREEDY = ["--temperature", 0, "--max-tokens", 6, "--seed", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a small model, and one that talks for long."""
    folder = tmp_path_factory.mktemp("chat")
    write_folder(folder / "source", tokenizer, max_seq_len=256)
    imported(folder / "source", folder / "checkpoints" / "tiny")
    write_folder(folder / "long source", tokenizer, max_seq_len=100_000, d_model=128)
    ends = folder / "long source" / "generation_config.json"
    ends.write_text("{}")
    # It never ends.
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        file = folder / "long source" / name
        settings = json.loads(file.read_text()) | {key: None}
        file.write_text(json.dumps(settings))
    text = (folder / "long source" / "tokenizer.json").read_text()
    (folder / "long source" / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|no|>"))
    imported(folder / "long source", folder / "checkpoints" / "long")
    return folder


@pytest.fixture
def here(run, place):
    def call(*words, stdin="", **options):
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        return run("chat", "-m", "tiny", *words, stdin=data, cwd=place, **options)

    return call


def answers(place: Path, *turns: str) -> list[str]:
    """What the library answers to the same messages."""
    model, tokenizer = load_model(place / "checkpoints" / "tiny")
    settings = SampleConfig(temperature=0, max_tokens=6, top_k=40)
    with Renderer() as renderer:
        session = Session(TorchDecoder(model), tokenizer, settings, renderer)
        said = []
        for turn in turns:
            session.messages.append({"role": "user", "content": turn})
            said.append("".join(token.text for token in session.answer(1)))
    return said


def test_a_pipe_is_answered_line_by_line(library, here, place):
    result = here(*GREEDY, stdin="hello\nand again\n")
    assert result.code == 0 and result.err == ""
    assert result.out == "".join(f"{text}\n" for text in answers(place, "hello", "and again"))


def test_json_is_one_object_a_turn(here, place):
    rows = [
        json.loads(line) for line in here(*GREEDY, "--json", stdin="hello\nagain").out.splitlines()
    ]
    assert [row["text"] for row in rows] == answers(place, "hello", "again")
    assert [row["schema"] for row in rows] == ["lm/chat/1"] * 2
    assert rows[0]["reused_tokens"] == 0 < rows[1]["reused_tokens"]
    assert [row["seed"] for row in rows] == [1, 2]


def test_lines_of_every_kind(here):
    """Empty lines are no messages; bytes that are no text, and Windows' ends, do no harm."""
    assert here(*GREEDY, stdin="").out == here(*GREEDY, stdin="\n  \n\n").out == ""
    assert here(*GREEDY, stdin=b"\xff\xfe caf\xe9\n").code == 0
    assert here(*GREEDY, stdin="hello\r\n").out == here(*GREEDY, stdin="hello\n").out
    assert here(*GREEDY, stdin="hello").out == here(*GREEDY, stdin="hello\n/quit\nmore\n").out


def test_commands_work_through_a_pipe(here, tmp_path, place):
    saved = tmp_path / "said.json"
    script = [
        "/system Be brief.",
        "hello",
        f"/save {saved}",
        "/context",
        "/undo",
        "/show",
        "/reset",
    ]
    result = here(*GREEDY, stdin="\n".join([*script, f"/load {saved}", "/retry", "/help"]))
    assert result.code == 0
    for part in ("saved 3 messages", "1 turn", "taken back", "forgotten", "loaded 3 messages"):
        assert part in result.err, result.err
    assert "<|im_start|>system\nBe brief.<|im_end|>\n" in result.out and "/undo" in result.err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    first, *_ = result.out.split("\n")[:-1]
    assert first == messages[2]["content"].split("\n")[0]
    assert here(*GREEDY, "--messages", saved, stdin="/context").err.endswith("1 turn\n")


def test_settings_can_be_changed_on_the_way(here):
    script = "hello\n/reset\n/set max_tokens=2\nhello\n/set temperature=1.5\n/set top-k=5\n"
    result = here(*GREEDY, "--json", stdin=script)
    assert [json.loads(line)["tokens"] for line in result.out.splitlines()] == [6, 2]
    assert "temperature = 1.5" in result.err and "top_k = 5" in result.err


MISTAKES = {
    "/nonsense": (2, "/nonsense is not a command"),
    "/hlep": (2, "did you mean /help?"),
    "/set top_p=7": (2, "out of range"),
    "/set temperature=NaN": (2, "finite"),
    "/set beauty=1": (2, "not KEY=VALUE"),
    "/undo": (2, "no turn"),
    "/retry": (2, "no answer"),
    "/save": (2, "file name"),
    "/load": (2, "file name"),
    "/save /proc/x": (4, "/proc/x: cannot be written"),
    "/save ~nobody-here/x": (4, "cannot be written"),
    "/load nowhere.json": (3, "nowhere.json: cannot be read"),
    "word " * 300: (6, "of 256 tokens"),
}


@pytest.mark.parametrize("line", MISTAKES, ids=[line[:20] for line in MISTAKES])
def test_a_mistake_ends_a_pipe_with_its_code(here, line):
    code, words = MISTAKES[line]
    failed(here(*GREEDY, stdin=f"{line}\nhello\n"), code, words)


def test_other_mistakes(run, here, place, tmp_path):
    failed(run("chat", "-m", "nothing", cwd=place), 3, "no checkpoint nothing", "tiny")
    failed(here("--messages", "nowhere.json"), 3, "nowhere.json")
    failed(here("--var", "x", stdin="hello\n"), 2, "KEY=VALUE")
    failed(here("--max-tokens", 300, stdin="hello\n"), 6, "of 256 tokens")
    assert here("--max-tokens", 0, "--seed", 1, "--temperature", 0, stdin="hello\n").code == 0


PICKY = "{% if messages[0].content == 'x' %}{{ raise_exception('not so') }}{% endif %}ok"


def test_a_template_may_reject_some_conversations(run, tmp_path, tokenizer):
    """The trial at the start is no message of the user's."""
    imported(write_folder(tmp_path / "m", tokenizer, template=PICKY), tmp_path / "picky")
    assert run("chat", "-m", "picky", *GREEDY, stdin=b"hello\n").code == 0
    failed(run("chat", "-m", "picky", *GREEDY, stdin=b"x\n"), 3, "not so")


class Terminal:
    """A pseudo-terminal with `lm chat` at its other end."""

    def __init__(self, folder: Path, *words: str, stdout: int | None = None) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "chat", *words],
            cwd=folder,
            env=command_environment(folder) | {"TERM": "dumb", "INPUTRC": "/dev/null"},
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.seen = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Read until a pattern shows; return what came, and forget it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.seen!r}"
            try:
                data = os.read(self.master, 4096)
            except OSError:
                data = b""
            assert data, f"it ended before {pattern!r}: {self.seen!r}"
            self.seen += self.decoder.decode(data).replace("\r", "")
        came, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return came

    def send(self, data: bytes) -> None:
        os.write(self.master, data)

    def ends(self) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(60)
        os.close(self.master)
        return code


def _own_terminal() -> None:
    """Make standard input the controlling terminal, so that its keys send signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # a test runner may block it
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


PROMPT = r"(?m)^> "
CTRL_C, CTRL_D = b"\x03", b"\x04"


@pytest.fixture
def terminal(place):
    opened = []

    def start(*words: str, **options) -> Terminal:
        opened.append(Terminal(place, *words, **options))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
            os.close(one.master)


def test_a_conversation_at_a_terminal(terminal, place):
    chat = terminal("-m", "tiny", *map(str, GREEDY))
    assert "/help" in chat.until(PROMPT), "what it is, and how to get help"
    chat.send(b"hello\n")
    came = chat.until(PROMPT)
    (text,) = answers(place, "hello")
    assert text.replace("\r", "").split("\n")[0] in came and "tok/s" in came and "1 turn" in came
    chat.send(b"one \\\n")
    chat.until("… ")
    chat.send(b"two\n")
    assert "2 turns" in chat.until(PROMPT)
    chat.send(b"/show\n")
    assert "one \ntwo<|im_end|>" in chat.until(PROMPT), "a backslash joins lines"
    # A mistake is said, and the conversation stays.
    for line, words in (
        (b"/nonsense\n", "not a command"),
        (b"word " * 300 + b"\n", "of 256 tokens"),
    ):
        chat.send(line)
        assert words in chat.until(PROMPT)
    chat.send(b"/context\n")
    assert "2 turns" in chat.until(PROMPT)
    chat.send(CTRL_D)
    assert chat.ends() == 0


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(terminal):
    chat = terminal("-m", "long", "--seed", "1", "--max-tokens", "90000")
    chat.until(PROMPT)
    chat.send(b"hello\n")
    chat.until(r"hello\n[\s\S]{20}")
    chat.send(CTRL_C)
    assert "stopped" in chat.until(PROMPT)
    chat.send(b"/show\n")
    shown = chat.until(PROMPT)
    assert re.search(r"<\|im_start\|>assistant\n[\s\S]{10,}<\|im_end\|>", shown), "half an answer"
    time.sleep(
        0.5
    )  # a signal between the prompt and its waiting for keys is noticed at the next key
    chat.send(b"half a line" + CTRL_C)
    chat.until(PROMPT)
    chat.send(b"/context\n")
    assert "1 turn" in chat.until(PROMPT), "at the prompt, Ctrl-C forgets the line only"
    chat.send(b"/quit\n")
    assert chat.ends() == 0


def test_a_second_ctrl_c_ends_the_program(terminal, tmp_path):
    """The first waits for a token, which does not come while a long prompt is being read."""
    said = [{"role": "user", "content": "word " * 15_000}, {"role": "assistant", "content": "x"}]
    (tmp_path / "said.json").write_text(json.dumps(said))
    chat = terminal("-m", "long", "--seed", "1", "--messages", str(tmp_path / "said.json"))
    chat.until(PROMPT)
    chat.send(b"now\n")
    chat.until("now\n")
    # Two that come while one matrix is being multiplied count as one, so go on pressing.
    for _ in range(100):
        time.sleep(0.3)
        if chat.process.poll() is not None:
            break
        chat.send(CTRL_C)
    assert chat.ends() == 130


def test_bytes_that_are_no_text_at_a_terminal(terminal):
    chat = terminal("-m", "tiny", *map(str, GREEDY))
    chat.until(PROMPT)
    chat.send(b"caf\xe9\n")
    chat.until(PROMPT)
    chat.send(b"/quit\n")
    assert chat.ends() == 0


def test_the_prompt_does_not_go_into_a_file(terminal, tmp_path, place):
    """As in `lm chat > answers.txt`."""
    with (tmp_path / "answers.txt").open("wb") as out:
        chat = terminal("-m", "tiny", *map(str, GREEDY), stdout=out.fileno())
        chat.until(PROMPT)
        chat.send(b"hello\n")
        chat.until(PROMPT)
        chat.send(CTRL_D)
        assert chat.ends() == 0
    (text,) = answers(place, "hello")
    assert (tmp_path / "answers.txt").read_bytes().decode() == text + "\n"
