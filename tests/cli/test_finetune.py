"""`lm finetune` through the command: what it says, what it refuses, what it leaves."""

import json

import pytest

from tests.engine.data.malformed import MALFORMED
from tests.engine.finetune.bases import rows, write_base, write_rows

SHORT = (
    "train.steps=6",
    "train.batch_size=4",
    "data.seq_len=96",
    "eval.every=3",
    "data.chat=plain",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", rows(40))


def test_it_says_what_is_learned_and_what_was_forgotten(run, base, data):
    result = run("finetune", "sft", "-m", base, f"data.train={data}", *SHORT, "eval.answers=5")
    assert result.code == 0, result.err
    assert result.out == "checkpoints/sft/best\n"
    for part in (
        "rows of prompt",
        "trained ",
        "stop   learned in",
        "at the longest batch",
        "step 0 · held-out: loss",
        "step 6 · held-out: loss",
        "answered word for word",
        "what the base learned, held out",
        "before",
    ):
        assert part in result.err, part
    shown = run("generate", "apple pear =", "-m", "sft", "--max-tokens", 3, "--temperature", 0)
    assert shown.code == 0


def test_json_lines_only_and_last_the_result(run, base, data):
    result = run("finetune", "sft-lora", "-m", base, f"data.train={data}", *SHORT, "--json", "-q")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert {line["schema"] for line in lines} == {
        *("lm/finetune/step/1", "lm/finetune/eval/1", "lm/finetune/saved/1", "lm/finetune/1")
    }
    last = lines[-1]
    assert last["schema"] == "lm/finetune/1" and last["base_loss"] > 0 and not last["answers"]
    assert last["texts"][0]["text"] == "what the base learned, held out"
    assert [line["step"] for line in lines if line["schema"] == "lm/finetune/step/1"] == [
        *range(1, 7)
    ]


def test_an_adapter_generates_shows_and_merges(run, base, data, tmp_path):
    made = run("finetune", "sft-lora", "-m", base, f"data.train={data}", *SHORT)
    assert made.code == 0 and "lora   rank 16" in made.err and "lm merge sft-lora" in made.err
    assert run("generate", "apple =", "-m", "sft-lora", "--max-tokens", 3).code == 0
    assert "rank" in run("show", "sft-lora").out
    merged = run("merge", "sft-lora", "-o", "checkpoints/whole")
    assert merged.code == 0, merged.err
    options = ("--max-tokens", 8, "--temperature", 0)
    one, other = (
        run("generate", "apple pear =", "-m", name, *options).out for name in ("sft-lora", "whole")
    )
    assert one == other


def test_a_second_run_there_is_refused_and_force_replaces_it(run, base, data):
    words = ("finetune", "sft", "-m", base, f"data.train={data}", *SHORT)
    assert run(*words).code == 0
    again = run(*words)
    assert again.code == 2 and "already holds a run" in again.err
    assert run(*words, "--resume").code == 0
    assert run(*words, "--force").code == 0


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_bad_rows_are_named_before_anything_starts(run, base, tmp_path, case):
    (tmp_path / case.file).write_bytes(case.data)
    more = ["data.seq_len=96", f"data.format={case.format}", f"data.columns={case.columns}"]
    result = run("finetune", "sft", "-m", base, f"data.train={case.file}", *more)
    assert result.code == 3 and result.out == "" and "Traceback" not in result.err
    assert case.message in result.err, result.err
    assert not (tmp_path / "checkpoints" / "sft" / "last").exists()


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["sft"], 2, "Give -m NAME"),
        (["sft", "-m", "nosuch"], 3, "no checkpoint nosuch"),
        (["sft", "-m", "BASE", "--resume"], 2, "no run to resume"),
        (["sft", "-m", "BASE", "--resume", "--force"], 2, "choose one"),
        (["sft", "-m", "BASE", "train.lorra.rank=4"], 2, "did you mean train.lora.rank"),
        (["sft", "-m", "BASE", "train.budget=soon"], 2, "is not a time"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, base, data, words, code, message):
    words = [base if word == "BASE" else word for word in words]
    result = run("finetune", *words, f"data.train={data}")
    assert result.code == code and message in result.err, result.err
