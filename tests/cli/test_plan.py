"""`lm plan` through the command: what it says, its JSON, and what runs say at their start."""

import json

import pytest

from cli.options import is_finetuning
from tests.engine.finetune.bases import rows, write_base, write_rows

TINY = ("model.d_model=16", "model.n_layers=1", "data.seq_len=32", "train.batch_size=4")


def test_it_says_what_a_run_takes_and_writes_nothing(run, tmp_path):
    result = run("plan", "smoke", *TINY, "--watts", 100, "--price-kwh", 0.5)
    assert result.code == 0, result.err
    words = [line.split()[0] for line in result.out.splitlines()]
    expected = "model params FLOPs tokens text size memory disk time energy"
    assert [word for word in words if word != "note"] == expected.split()
    assert "20 steps of" in result.out and "measured" in result.out and "at 100 W" in result.out
    assert "measuring a few steps" in result.err
    assert not (tmp_path / "checkpoints").exists()
    assert "give --watts" in run("plan", "smoke", *TINY).out


def test_json_has_everything_and_null_for_what_is_not_known(run):
    result = run("plan", "smoke", *TINY, "--no-measure", "--json", "-q")
    assert result.code == 0 and not result.err
    made = json.loads(result.out)
    assert made["schema"] == "lm/plan/1"
    assert made["steps"] == 20 and made["tokens"] == 20 * 4 * 32
    groups = made["parameters"]
    counted = {name: n for name, n in groups.items() if name not in ("total", "trained")}
    assert sum(counted.values()) == groups["total"] == groups["trained"]
    memory = made["memory"]
    assert memory["peak"] == sum(memory.values()) - memory["peak"]
    assert made["seconds"] is made["kwh"] is made["money"] is made["measured_memory"] is None


def test_energy_and_money_follow_from_the_time(run):
    words = ("plan", "smoke", *TINY, "--json", "--watts", 100, "--price-kwh", 0.5)
    made = json.loads(run(*words).out)
    assert made["seconds"] > made["scoring_seconds"] > 0
    assert made["kwh"] == pytest.approx(100 * made["seconds"] / 3.6e6)
    assert made["money"] == pytest.approx(made["kwh"] * 0.5)


def test_a_finetuning_recipe_is_told_by_what_it_says_or_by_its_base(run, tmp_path, tokenizer):
    assert is_finetuning("sft") and is_finetuning("domain") and not is_finetuning("stdlib")
    base = write_base(tmp_path / "base", tokenizer)
    data = write_rows(tmp_path / "rows.jsonl", rows(20))
    given = (f"data.train={data}", "data.seq_len=96", "--no-measure")
    result = run("plan", "sft-lora", "-m", base, *given)
    assert result.code == 0, result.err
    assert "are trained beside them" in result.out and "time   not measured" in result.out
    result = run("plan", "sft", *given)
    assert result.code == 2 and "Give -m NAME" in result.err


def test_refusals_have_the_exit_code_of_their_kind(run):
    for code, given in (
        (2, ("train.schedule.warmup=100",)),
        (2, ("train.batch_size=6", "train.accumulate=4")),
        (2, ("data.seq_len=2000",)),
        (3, ("data.train=/nowhere",)),
        (4, ("model.n_layers=1000", "model.d_model=100000")),
    ):
        result = run("plan", "smoke", *given, "--no-measure")
        assert result.code == code, (given, result.err)
        assert result.err.splitlines()[-1].startswith("error: ") and not result.out


def test_a_run_begins_with_the_short_form(run):
    result = run("train", "smoke", *TINY, "train.steps=13", "eval.final_bytes=500")
    assert result.code == 0, result.err
    assert "takes  about" in result.err and "of disk a checkpoint" in result.err
    assert "plan: 13 steps take about" in result.err
