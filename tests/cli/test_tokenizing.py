"""`lm tokenize` with every kind of tokenizer, and several side by side."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.tokenizing import differences, originals
from tests.cli.test_errors import failed
from tests.conftest import Result


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache for all tests: reading the ranks anew takes a second."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def lm(run, cache, monkeypatch):
    """Run `lm tokenize`; it must end with `code`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def call(*words: object, stdin: bytes = b"", code: int = 0) -> Result:
        result = run("tokenize", *words, stdin=stdin)
        assert result.code == code, result
        return result

    return call


@pytest.fixture
def ours(tmp_path, tokenizer) -> str:
    """The name of a checkpoint with a tokenizer of our own."""
    folder = tmp_path / "checkpoints" / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save(folder, 64)
    return "ours"


def test_published_ids(lm):
    """Two sentences whose ids in cl100k_base are known, and back."""
    for text, ids in (
        ("Hello, how are you today?", "9906 11 1268 527 499 3432 30"),
        ("The weather today is", "791 9282 3432 374"),
    ):
        for model in ("cl100k_base", "gpt-4", "openai/gpt-3.5-turbo-0125"):
            assert lm(text, "-m", model, "--ids").out == ids + "\n"
        assert lm(ids, "-m", "gpt-4", "--decode").out == text


def test_json_of_an_encoding(lm):
    found = json.loads(lm("Grüße 你", "-m", "gpt-5", "--json").out)
    assert found["schema"] == "lm/tokenize/1" and found["vocab_size"] == 200_019
    assert found["bytes"] == 11 == found["pieces"][-1]["end"]
    assert json.loads(lm("x", "-m", "gpt-4", "--json").out)["vocab_size"] == 100_277


def test_bytes_that_are_not_utf8(lm, ours):
    """A tokenizer of our own keeps any bytes; what goes to a model behind an interface cannot."""
    assert json.loads(lm("-m", ours, "--json", stdin=b"a\xffb").out)["pieces"][1]["end"] == 2
    result = lm("-m", "gpt-5", "--ids", stdin=b"a\xffb")
    assert result.out == lm("a\ufffdb", "-m", "gpt-5", "--ids").out
    assert "1 place is not UTF-8" in result.err


@pytest.mark.parametrize(("model", "name"), [("gpt-5", "<|endoftext|>"), ("ours", "<|im_end|>")])
def test_special_looking_text(lm, ours, model, name):
    words = [f"a{name}b", "-m", model, "--ids"]
    assert lm(*words) == lm(*words, "--special", "text")
    assert len(lm(*words).out.split()) > 3 == len(lm(*words, "--special", "parse").out.split())
    failed(lm(*words, "--special", "error", code=3), 3, "character 2", name)
    assert lm("ab", "-m", model, "--special", "error", "--ids").out


def test_several_compared(lm, ours):
    text = "internationalisation <|endoftext|>"
    found = json.loads(lm(text, "-m", "gpt-5", "--compare", "gpt-4,ours", "--json").out)
    assert found["schema"] == "lm/tokenize/compare/1"
    models = [row["model"] for row in found["tokenizers"]]
    assert models == ["gpt-5", "gpt-4", "ours"]
    for row in found["tokenizers"]:
        assert row["tokens"] == len(lm(text, "-m", row["model"], "--ids").out.split())
    for place in found["differences"]:
        assert len({"".join(pieces) for pieces in place["pieces"]}) == 1
        assert len({len(pieces) for pieces in place["pieces"]} | {1}) > 1
    plain = lm(text, "--compare", "gpt-5", "--compare", "gpt-4")
    assert plain.out.splitlines()[0].split("\t")[2] == "gpt-5"
    assert "split differently" in plain.err
    same = lm(text, "-m", "gpt-5", "--compare", "gpt-4o")
    assert "differently in 0 places" in same.err


def test_several_models_are_compared_and_differences_marked(lm):
    """-m gpt-5,gpt-4 showed one of them; only colour told where they differ."""
    result = lm("hello Rechtschreibung", "-m", "gpt-5,gpt-4")
    rows = [line.split("\t") for line in result.out.splitlines()]
    assert [row[2] for row in rows[:2]] == ["gpt-5", "gpt-4"]
    assert rows[2:] == [["5", "gpt-5", "‹ Rechts›"], ["5", "gpt-4", "‹ Re›‹chts›"]]
    assert "in 1 place of 21 bytes" in result.err


def test_estimates_are_compared_by_their_counts(lm):
    words = ["a text", "-m", "gpt-5", "--compare", "gpt-4,claude-sonnet-4-5"]
    assert "claude-sonnet-4-5\testimated ± 25 %" in lm(*words).out
    last = json.loads(lm(*words, "--json").out)["tokenizers"][-1]
    assert last["tokens"] > 0 and "vocab_size" not in last


@given(st.lists(st.sampled_from([b"a", b"\xff", b"\xe4\xbd", "\ufffd".encode(), "中".encode()])))
def test_places_in_bytes_that_are_not_utf8(parts):
    """Offsets were those of the text after U+FFFD had come in."""
    data, read, expected, starts = b"".join(parts), 0, [], []
    at = 0
    while at < len(data):
        size = next(n for n in (3, 2, 1, 0) if n == 0 or _is_one(data[at : at + n]))
        starts.append(read)
        expected.append(at)
        if size:
            at, read = at + size, read + size
        else:
            at += 2 if data[at : at + 2] == b"\xe4\xbd" else 1
            read += 3
    assert originals(data, starts) == expected


def _is_one(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def test_two_texts_are_refused(lm, tmp_path):
    """They were glued with an empty line between."""
    (tmp_path / "f").write_text("x")
    failed(lm("hi", "-f", "f", "-m", "gpt-5", code=2), 2, "two texts")
    failed(lm("hi", "-m", "gpt-5", stdin=b"x", code=2), 2, "two texts")


def test_without_a_model_it_is_the_default_or_the_only_checkpoint(lm, ours, tmp_path):
    (tmp_path / "checkpoints" / ours / "config.json").write_text("{}")
    assert "for checkpoints/ours" in lm("x").err
    shutil.rmtree(tmp_path / "checkpoints")
    assert "for gpt-5" in lm("x").err


def test_what_cannot_be_compared(lm):
    failed(lm("x", "--compare", "gpt-5", code=2), 2, "two tokenizers")
    failed(lm("x", "-m", "gpt-5", "--compare", "gpt-4", "--ids", code=2), 2, "--ids")
    failed(lm("x", "-m", "claude-opus-4-1", code=2), 2, "not published")
    failed(lm("x", "-m", "gtp-5", code=2), 2, "did you mean gpt-5")


class Cutter:
    """A tokenizer whose pieces are given."""

    name, vocab_size = "cutter", 1

    def decode(self, ids):
        return b"x" * 100

    def pieces(self, data, special):
        raise NotImplementedError

    def places(self, data, starts):
        return list(starts)


@given(st.lists(st.sets(st.integers(1, 99), max_size=20), min_size=2, max_size=4))
def test_differences_are_what_lies_between_shared_boundaries(cuts):
    data = bytes(range(100))
    found = []
    for cut in cuts:
        places = [0, *sorted(cut), 100]
        found.append([(0, data[a:b]) for a, b in pairwise(places)])
    shown = list(differences([Cutter()] * len(cuts), found, data))
    for place in shown:
        whole = {b"".join(pieces) for pieces in place.pieces}
        assert len(whole) == 1 and whole.pop()[0] == place.start
        assert len(set(place.pieces)) > 1
    assert bool(shown) == (len(set(map(frozenset, cuts))) > 1)
