"""From rows to samples: what is held out, what is refused, how much is replayed."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from engine.config import ModelConfig
from engine.errors import DataError, RecipeError
from engine.finetune.prepare import check_settings, hold_out, read_rows, replay_rows
from engine.recipe import load
from tests.engine.finetune.bases import rows, write_rows


def prepare(tmp_path: Path, tokenizer, data: Path, *overrides: str):
    """Read rows; returns (format, rule, sides)."""
    recipe = load(f"data: {{train: {data}, holdout: 5}}\ntrain: {{base: x}}", "test", overrides)
    steps = read_rows(recipe, tokenizer, tmp_path, None, datetime(2026, 1, 2))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_a_row_never_changes_sides(tmp_path, tokenizer):
    """Held out by content: whatever is added, moved or repeated, it stays where it was."""
    few = write_rows(tmp_path / "few.jsonl", rows(20))
    more = write_rows(tmp_path / "more.jsonl", [*rows(40)[::-1], *rows(20)])
    texts = {}
    for file in (few, more):
        _, rule, sides = prepare(tmp_path, tokenizer, file)
        assert "modulo 5" in rule
        texts[file] = {
            name: {tokenizer.decode(s.ids.tolist()) for s in sides[name].samples} for name in sides
        }
        assert not texts[file]["train"] & texts[file]["valid"]
    assert texts[few]["valid"] <= texts[more]["valid"]
    assert texts[few]["train"] <= texts[more]["train"]


def test_some_row_is_held_out_and_some_row_is_not():
    assert len(hold_out({"0f", "1f", "2f"}, 1000)) == 1
    assert hold_out({"00", "0a"}, 2) != {"00", "0a"}
    assert hold_out({f"{n:x}" for n in range(100)}, 10) == {f"{n:x}" for n in range(0, 100, 10)}


def test_rows_that_are_all_alike_cannot_be_held_out(tmp_path, tokenizer):
    data = write_rows(tmp_path / "same.jsonl", rows(1) * 9)
    with pytest.raises(DataError, match="1 distinct rows cannot be trained on and held out too"):
        prepare(tmp_path, tokenizer, data)


def test_given_validation_rows_are_all_held_out(tmp_path, tokenizer):
    train = write_rows(tmp_path / "train.jsonl", rows(6))
    valid = write_rows(tmp_path / "valid.jsonl", rows(3))
    _, rule, sides = prepare(tmp_path, tokenizer, train, f"data.valid={valid}")
    assert rule == f"all of {valid}"
    assert (len(sides["train"].samples), len(sides["valid"].samples)) == (6, 3)


def test_tasks_are_noted_by_place(tmp_path, tokenizer):
    made = [row | {"task": f"kind {i % 2}"} for i, row in enumerate(rows(12))]
    data = write_rows(tmp_path / "tasks.jsonl", made)
    _, _, sides = prepare(tmp_path, tokenizer, data)
    tasks = sides["train"].tasks | sides["valid"].tasks
    assert tasks["tasks.jsonl:1"] == "kind 0" and tasks["tasks.jsonl:2"] == "kind 1"
    assert len(tasks) == 12


def test_nothing_learned_is_an_error(tmp_path, tokenizer):
    data = tmp_path / "ids.jsonl"
    ids = [{"input_ids": [5, 6, n], "labels": [-100] * 3} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in ids))
    with pytest.raises(DataError, match="ids.jsonl:1: nothing to learn"):
        prepare(tmp_path, tokenizer, data)


@pytest.mark.parametrize("share, windows", [(0.0, 0), (0.5, 8), (0.2, 2), (0.01, 1)])
def test_replay_is_a_share_of_tokens(share, windows):
    """8 packs of 64 tokens are 512; as many again are 8 windows of 64."""
    recipe = load("data: {seq_len: 64}\ntrain: {batch_size: 8}", "test", [f"train.replay={share}"])
    assert replay_rows(recipe, [64] * 20) == windows


def test_the_shape_comes_from_the_base():
    base = ModelConfig(vocab_size=300, d_model=48, n_heads=4, max_seq_len=512)
    check_settings(load("data: {seq_len: 512}\ntrain: {base: x}", "test"), base)
    for overrides, message in (
        (["model.n_layers=3"], "model"),
        (["data.seq_len=513"], "the base reads 512 tokens"),
        (["eval.seq_len=600"], "the base reads 512 tokens"),
        (["data.format=parquet"], "is a kind of file"),
        (["data.column=body"], "data.columns=text=body"),
        (["run.dtype=int8", "train.lora.rank=2"], "they are frozen"),
    ):
        recipe = load("data: {seq_len: 512}\ntrain: {base: x}", "test", overrides)
        with pytest.raises(RecipeError, match=message):
            check_settings(recipe, base)
