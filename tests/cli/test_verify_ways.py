"""`lm generate --verify` shows every way, and exits with 7 naming the first difference."""

import json

import pytest

from cli import verify_ways
from engine.generate.agreement import WAYS
from engine.generate.reference import TorchDecoder
from tests.cli.test_errors import failed
from tests.engine.interop.folders import imported, write_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "source", tokenizer)
    imported(folder / "source", folder / "checkpoints" / "tiny")
    return folder


def verify(run, place, *words):
    more = ("-m", "tiny", "--verify", "--max-tokens", 9, "--kernels", "torch", *words)
    return run("generate", "def add(a, b):\n" * 9, *more, cwd=place)


def test_every_way_is_a_row(run, place):
    result = verify(run, place)
    assert result.code == 0, result.err
    *rows, beside = [line.split() for line in result.out.splitlines()]
    assert " ".join(beside) == "torch fp32 torch not compared: it is torch itself"
    assert [row[2] for row in rows] == list(WAYS)
    assert all(row[:2] == ["torch", "fp32"] and row[3:6] == ["9", "ids", "same"] for row in rows)
    assert rows[0][-3:] == ["to", "the", "bit"]
    assert "the same in every way tried for: torch fp32" in result.err
    assert f"tried: {', '.join(WAYS)}" in result.err and "skipped" not in result.err

    found = json.loads(verify(run, place, "--json").out)
    assert found["schema"] == "lm/verify-generate/1" and found["ok"]
    (decoder,) = found["decoders"]
    assert [way["name"] for way in decoder["ways"]] == list(WAYS)
    assert all(way["same"] and len(way["ids"]) == 9 for way in decoder["ways"])


def test_a_difference_is_named(run, place, monkeypatch):
    right = TorchDecoder.forward

    def wrong(self, cache, runs):
        logits = right(self, cache, runs)
        return -logits if len(runs) == 3 and cache.lengths[0] > 102 else logits

    monkeypatch.setattr(TorchDecoder, "forward", wrong)
    result = verify(run, place)
    assert result.code == 7 and len(result.out.splitlines()) == len(WAYS) + 1
    assert "torch fp32: batched gives" in result.err and "where uncached gives" in result.err
    result = verify(run, place, "--json")
    assert result.code == 7 and json.loads(result.out)["ok"] is False


def test_our_own_c_is_held_against_torch_where_both_have_the_weights(
    library, run, place, monkeypatch
):
    words = ["generate", "def", "-m", "tiny", "--verify", "--max-tokens", 3, "--device", "cpu"]
    result = run(*words, cwd=place)
    assert result.code == 0, result.err
    said = {
        line.split()[1]: " ".join(line.split()[3:])
        for line in result.out.splitlines()
        if line.split()[2] == "torch"
    }
    assert said["fp32"].startswith("logits within ") and "of the largest" in said["fp32"]
    assert said["bf16"] == "not compared: here weights are rounded to bf16"
    assert [said[name] for name in ("int8", "int4")] == [
        f"not compared: torch has no {name}" for name in ("int8", "int4")
    ]
    assert "65 tokens, repeated from " in result.err  # so that a block can be restored
    assert not [line for line in result.out.splitlines() if "skipped" in line]

    monkeypatch.setattr(verify_ways, "TOLERANCE", 0.0)  # the control
    result = run(*words, "--dtype", "fp32", cwd=place)
    assert result.code == 7 and "error: native fp32: logits within" in result.err


@pytest.mark.parametrize(
    "words, said",
    [
        (("--temperature", 1), "leave out --temperature"),
        (("-n", 2), "leave out -n"),
        (("--stop", "x"), "leave out --stop"),
        (("--draft", "lookup"), "leave out --draft"),
        (("--max-tokens", 0), "would compare nothing"),
    ],
)
def test_what_would_be_ignored_is_refused(run, place, words, said):
    failed(verify(run, place, *words), 2, said)


def test_what_does_not_fit_the_context_is_refused(run, place):
    failed(verify(run, place, "--max-tokens", 1000), 6, "1,000 > context")
