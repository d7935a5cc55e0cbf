"""--draft: the same text by every guesser, what is told of it, and what is refused."""

import json

import pytest

from engine.config import TokenizerConfig
from engine.text.tokenizer import learn
from tests.conftest import TEXT
from tests.engine.interop.folders import imported, write_folder

PROMPT = "def f(x): return x\ndef f(x): return x\ndef"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a model, a smaller one, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("drafts")
    other = learn([TEXT[::-1]], TokenizerConfig(vocab_size=400))
    for name, words, shape in (
        ("tiny", tokenizer, {}),
        ("small", tokenizer, {"n_layers": 1, "d_model": 16}),
        ("foreign", other, {}),
        ("large", tokenizer, {"n_layers": 3}),
    ):
        write_folder(folder / "sources" / name, words, max_seq_len=512, **shape)
        imported(folder / "sources" / name, folder / "checkpoints" / name)
    return folder


@pytest.fixture
def generate(run, place):
    def call(*words):
        sizes = ["--max-tokens", 40, "--temperature", 0, "--seed", 1]
        return run("generate", PROMPT, "-m", "tiny", *sizes, *words, cwd=place)

    return call


@pytest.mark.parametrize("draft", ["lookup", "layers:1", "small", "checkpoints/small"])
def test_the_text_is_the_same_and_the_figures_are_told(draft, generate):
    plain, found = generate(), generate("--draft", draft)
    assert found.code == 0 and found.out == plain.out
    stats, guesses = found.err.split(f"\n{draft}: ")
    assert "tok/s" in stats and " guesses right · " in guesses
    assert all(len(line) <= 80 for line in found.err.splitlines())
    rows = generate("--draft", draft, "--draft-tokens", 3, "-n", 2, "--json").out.splitlines()
    for row in map(json.loads, rows):
        assert row["text"] == plain.out.removesuffix("\n")
        facts = row["draft"]
        assert facts["guesser"] == draft
        assert facts["tokens"] == facts["forwards"] + facts["accepted"] >= 39
        assert 0 <= facts["accepted"] <= facts["guessed"] <= 3 * facts["guessing"]
        assert facts["real"] > 0 and facts["expected"] > 0
    assert "draft" not in json.loads(generate("--json").out)


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--draft", "layers:2"], 2, "layers:N with N from 1 to 1"),
        (["--draft", "layers:x"], 2, "layers:N"),
        (["--draft", "nobody"], 3, "nobody"),
        (["--draft", "foreign"], 3, "vocabulary is not that of the model"),
        (["--draft", "large"], 2, " a token where the model reads "),
        (["--draft", "tiny"], 2, "no guess could save time; take a smaller draft, or lookup"),
        (["--draft-tokens", 3], 2, "add --draft"),
        (["--draft", "lookup", "--draft-tokens", 0], 2, "draft-tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_line(words, code, message, generate):
    result = generate(*words)
    assert (result.code, result.out) == (code, "")
    assert message in result.err and "Traceback" not in result.err


def test_a_conversation_guesses_too(run, place):
    words = ["chat", "-m", "tiny", "--temperature", 0, "--seed", 1, "--max-tokens", 20, "--json"]
    lines = b"hello\nand again\nhello\n"

    def said(*more):
        result = run(*words, *more, stdin=lines, cwd=place)
        assert result.code == 0, result
        return [json.loads(line) for line in result.out.splitlines()]

    plain = said()
    for draft in ("lookup", "layers:1"):
        found = said("--draft", draft)
        assert [row["text"] for row in found] == [row["text"] for row in plain]
        assert [row["reused_tokens"] for row in found] == [row["reused_tokens"] for row in plain]
        assert all(row["draft"]["guesser"] == draft for row in found)


def test_a_draft_without_a_name_is_refused(generate):
    result = generate("--draft", "")
    assert result.code == 2 and "--draft names nothing" in result.err
    assert len(result.err.splitlines()) == 1
