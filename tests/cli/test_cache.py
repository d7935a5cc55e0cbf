"""`lm cache` through the command: listed, freed, checked and repaired."""

import json
import os
import time

import numpy as np
import pytest

from cli.caching import seconds
from cli.options import byte_count
from engine.errors import RecipeError
from engine.generate.blocks import chain, write
from engine.generate.prefix_folder import entries, note, place
from tests.cli.test_errors import failed
from tests.engine.interop.folders import imported, write_folder


@pytest.fixture
def cache(tmp_path):
    """A cache folder with blocks of two models, a library, tokens, and a thing nobody knows."""
    cache = tmp_path / "cache" / "lm-workbench"
    for name, count, days in (("tiny [b]", 3, 1), ("old", 2, 40)):
        for block in chain(name, range(64 * count)):
            path = block.path(place(cache))
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, block, np.full(9_616, block.index, np.uint8))  # 10,000 bytes in all
            used = time.time() - 86_400 * days
            os.utime(path, (used, used))
        note(path.parent, name)
    for file, size in (("kernels/a.so", 5000), ("ab12/shards.json", 2), ("ab12/train.bin", 700)):
        (cache / file).parent.mkdir(exist_ok=True)
        (cache / file).write_bytes(bytes(size))
    (cache / "x.ranks").write_bytes(bytes(300))
    (cache / "strange").write_bytes(bytes(10))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "large").write_bytes(bytes(10**6))
    (cache / "link").symlink_to(tmp_path / "elsewhere")
    return cache


def test_ls_of_nothing(run):
    result = run("cache", "ls")
    assert result.code == 0 and result.out == "" and "no prompts are kept" in result.err
    assert json.loads(run("cache", "ls", "--json").out)["prefixes"] == []
    assert run("cache", "verify").out == "0 blocks, 0 bytes, every one is whole\n"


def test_ls_names_models_and_what_else_is_there(run, cache, tmp_path):
    lines = run("cache", "ls").out.splitlines()
    assert [line.split()[:2] for line in lines[:1]] == [["model", "blocks"]]
    assert lines[1].startswith("tiny [b]") and "192" in lines[1] and "30.0 kB" in lines[1]
    assert lines[2].startswith("old") and lines[3].startswith("also there")
    assert lines[4].split() == ["C", "libraries", "1", "5.0", "kB"]
    found = json.loads(run("cache", "ls", "--json").out)
    assert found["schema"] == "lm/cache/1" and found["bytes"] == 50_000
    assert [(m["name"], m["blocks"], m["tokens"]) for m in found["prefixes"]] == [
        ("tiny [b]", 3, 192),
        ("old", 2, 128),
    ]
    assert {o["kind"]: (o["files"], o["bytes"]) for o in found["others"]} == {
        "C libraries": (1, 5000),
        "tokens to train on": (2, 702),
        "tokenizers": (1, 300),
        "other": (2, 10 + len(str(tmp_path / "elsewhere"))),  # a link is as long as its text
    }


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "long"])
def test_ls_reads_no_name_without_end(kind, run, cache):
    name = next(entries(place(cache))).path.parent / "name"
    name.unlink()
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "zero":
        name.symlink_to("/dev/zero")
    elif kind == "folder":
        name.mkdir()
    else:
        name.write_text("x" * 1000)
    (cache / "kernels" / "a.sha256").write_text("0" * 64)
    found = json.loads(run("cache", "ls", "--json").out)
    names = {model["name"] for model in found["prefixes"]}
    assert ("x" * 200 if kind == "long" else "") in names and len(names) == 2
    assert {"kind": "C libraries", "files": 1, "bytes": 5000} in found["others"]


def test_gc_frees_what_it_says(run, cache):
    dry = run("cache", "gc", "--older-than", "30d", "--dry-run")
    assert dry.out == "would free 20.0 kB of 2 blocks; 30.0 kB of 3 blocks left\n"
    assert len(list(entries(place(cache)))) == 5
    done = run("cache", "gc", "--older-than", "30d", "--json")
    assert json.loads(done.out) == {
        "schema": "lm/cache-gc/1",
        "dry_run": False,
        "blocks": 2,
        "bytes": 20_000,
        "left_blocks": 3,
        "left_bytes": 30_000,
    }
    assert run("cache", "gc", "--max-size", "15kB").out.startswith("freed 20.0 kB of 2 blocks")
    assert run("cache", "gc", "--max-size", "0").out.endswith("0 bytes of 0 blocks left\n")
    assert (cache / "kernels" / "a.so").exists() and (cache / "ab12" / "train.bin").exists()


def test_verify_names_the_damaged_and_repairs(run, cache):
    assert run("cache", "verify").out == "5 blocks, 50.0 kB, every one is whole\n"
    victim = next(entries(place(cache))).path
    data = bytearray(victim.read_bytes())
    data[5000] ^= 1
    victim.write_bytes(data)
    result = run("cache", "verify")
    assert result.code == 7 and result.out == f"{victim}: its digest differs\n"
    assert "1 of 5 blocks are damaged" in result.err
    result = run("cache", "verify", "--json")
    assert result.code == 7 and json.loads(result.out)["damaged"] == [
        {"path": str(victim), "problem": "its digest differs", "removed": False}
    ]
    result = run("cache", "verify", "--repair")
    assert result.code == 0 and result.out == f"{victim}: its digest differs; removed\n"
    assert run("cache", "verify").code == 0 and not victim.exists()


def test_sizes_and_times(run):
    sizes = {"0": 0, "1GB": 10**9, "1.5 mb": 1_500_000, "2k": 2000, "7B": 7, "3T": 3 * 10**12}
    assert {text: byte_count(text, "--x") for text in sizes} == sizes
    times = {"30d": 2_592_000, "1.5h": 5400, "10m": 600, "0s": 0}
    assert {text: seconds(text, "--x") for text in times} == times
    for read, texts in (
        (byte_count, ("", "GB", "-1", "1e9", "nan", "1 GiB")),
        (seconds, ("", "30", "d", "-1d")),
    ):
        for text in texts:
            with pytest.raises(RecipeError, match="--x"):
                read(text, "--x")
    failed(run("cache", "gc"), 2, "--max-size 1GB")
    failed(run("cache", "gc", "--older-than", "soon"), 2, "--older-than soon")


@pytest.fixture(scope="module")
def place_of_models(tmp_path_factory, tokenizer):
    """A folder with checkpoints/tiny."""
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder / "source", tokenizer, max_seq_len=2048)
    imported(folder / "source", folder / "checkpoints" / "tiny")
    return folder


GREEDY = ["--temperature", 0, "--max-tokens", 5, "--seed", 1]
TEXT = " ".join(f"word {number}" for number in range(150))


def test_generate_reads_a_prompt_once(run, tmp_path, place_of_models):
    def call(text, *words):
        return run("generate", text, "-m", "tiny", *GREEDY, *words, cwd=place_of_models)

    kept = place(tmp_path / "cache" / "lm-workbench")
    plain = call(TEXT)
    assert plain.code == 0 and not kept.exists() and "from cache" not in plain.err
    first, second = call(TEXT, "--prefix-cache"), call(TEXT, "--prefix-cache")
    assert plain.out == first.out == second.out
    assert "from cache" not in first.err and list(entries(kept))
    facts = json.loads(call(TEXT + " and more", "--prefix-cache", "--json").out)
    assert facts["prefix_tokens"] > 0 == facts["prefix_tokens"] % 64
    total = json.loads(call(TEXT, "--json").out)["prompt_tokens"]
    assert f"prefix {facts['prefix_tokens']:,} of {total:,} tok from cache" in second.err
    assert facts["prefix_too_short"] is False and "is not kept" not in first.err
    several = call(TEXT, "--prefix-cache", "-n", 2)
    assert several.out == plain.out * 2
    assert run("cache", "ls").out.splitlines()[1].startswith("checkpoints/tiny")

    victim = min(entries(kept), key=lambda entry: -entry.used)  # the first of the prompt
    victim.path.write_bytes(victim.path.read_bytes()[:-1] + b"?")
    assert run("cache", "verify").code == 7
    told = call(TEXT, "--prefix-cache")
    assert told.out == plain.out and "is damaged and computed again" in told.err
    assert run("cache", "verify").code == 0


def test_it_is_said_once_that_a_prompt_is_too_short(library, run, place_of_models):
    words = ["generate", "-m", "tiny", *GREEDY, "--device", "cpu", "-n", 2]

    def call(*more):
        return run(*words, *more, cwd=place_of_models)

    result = call("word", "--prefix-cache")
    assert result.code == 0 and result.err.count("a prompt below 64 tok is not kept") == 1
    assert "is not kept" not in call("word").err
    assert "is not kept" not in call("word " * 80, "--prefix-cache").err
    rows = call("word", "--prefix-cache", "--json").out.splitlines()
    assert [json.loads(row)["prefix_too_short"] for row in rows] == [True, True]
    assert "prefix_too_short" not in json.loads(call("word", "--json").out.splitlines()[0])


def test_room_is_bounded(run, tmp_path, place_of_models):
    words = ["generate", TEXT, "-m", "tiny", *GREEDY]
    failed(run(*words, "--prefix-cache-size", "1GB", cwd=place_of_models), 2, "add that")
    failed(run(*words, "--prefix-cache", "--prefix-cache-size", "x", cwd=place_of_models), 2, "500")
    assert run(*words, "--prefix-cache", "--prefix-cache-size", "0", cwd=place_of_models).code == 0
    assert not list(entries(place(tmp_path / "cache" / "lm-workbench")))


def test_a_conversation_is_read_once(run, place_of_models):
    def call(*words):
        talk = ["chat", "-m", "tiny", *GREEDY, "--json", "--system", TEXT]
        return run(*talk, *words, stdin=b"hello\nagain\n", cwd=place_of_models)

    plain, first, second = call(), call("--prefix-cache"), call("--prefix-cache")
    rows = [[json.loads(line) for line in r.out.splitlines()] for r in (plain, first, second)]
    assert [[row["text"] for row in answers] for answers in rows] == [
        [row["text"] for row in rows[0]]
    ] * 3
    assert [answers[0]["prefix_tokens"] > 0 for answers in rows] == [False, False, True]


def test_a_model_with_windows_says_so_and_answers(run, tmp_path, tokenizer):
    write_folder(tmp_path / "source", tokenizer, max_seq_len=2048, sliding_window=40)
    imported(tmp_path / "source", tmp_path / "checkpoints" / "windowed")
    words = ["generate", TEXT, "-m", "windowed", *GREEDY]
    plain, kept = run(*words), run(*words, "--prefix-cache")
    assert kept.code == 0 and kept.out == plain.out and kept.err.count("no prefix cache") == 1
