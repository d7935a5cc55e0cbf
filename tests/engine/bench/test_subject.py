"""What is measured: the model of a recipe, whole, and its stand-in tokenizer."""

import dataclasses
from pathlib import Path

import pytest

from engine.bench.cases import Case
from engine.bench.subject import from_checkpoint, from_recipe, random_ids, settings, stand_in
from engine.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from engine.errors import RecipeError, ResourceError
from engine.recipe import override
from tests.engine.interop.folders import imported, write_folder

CACHE = Path("/nonexistent")  # without kernels nothing is built
RECIPE = Recipe(
    run=RunConfig(kernels="torch"),
    tokenizer=TokenizerConfig(vocab_size=700),
    model=ModelConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    data=DataConfig(seq_len=64),
    train=TrainConfig(batch_size=8),
)


def case(dtype="auto", kernels="torch", **changes):
    wish = {"dtype": dtype, "kernels": kernels, "threads": 1}
    return Case(**({"what": "decode", "model": "m"} | wish | changes))


def test_a_recipe_without_a_checkpoint_is_whole():
    subject = from_recipe(RECIPE, CACHE)
    decoder, tokenizer = subject.loaded(case("bf16"))
    assert decoder.config == subject.config and subject.config.vocab_size == 700
    assert decoder.name == "torch bf16" == f"torch {decoder.kv}"
    assert tokenizer.vocab_size == 700 and not tokenizer.ends
    assert stand_in(RECIPE).ends  # the control: those of the loaded one were taken away


def test_a_vocabulary_of_the_models_own_is_kept():
    recipe = override(RECIPE, model={"vocab_size": 900})
    assert from_recipe(recipe, CACHE).config.vocab_size == 900


def test_random_ids_are_the_same_each_time_and_known():
    subject = from_recipe(RECIPE, CACHE)
    _, tokenizer = subject.loaded(case())
    rows = random_ids(subject, tokenizer, 2, 50)
    assert rows == random_ids(subject, tokenizer, 2, 50) and rows[0] != rows[1]
    assert max(map(max, rows)) < 700


def test_settings_are_those_that_a_speed_depends_on():
    """The optimizer is of training alone; length and rate are of nothing."""
    changed = override(RECIPE, train={"optim": OptimConfig(name="adamw"), "recompute": True})
    subject = from_recipe(override(changed, train={"steps": 7, "dropout": 0.0}), CACHE)
    model = settings(subject, "decode").split()
    assert "model.d_model=32" in model and not any(
        "n_heads" in word for word in model
    )  # 4 is usual
    more = settings(subject, "train").split()
    assert set(more) - set(settings(subject, "decode").split()) == {
        "train.optim.lr=0.002",
        "train.optim.name=adamw",
        "train.recompute=true",
    }
    greedy = dataclasses.replace(subject, sample=dataclasses.replace(subject.sample, temperature=0))
    assert "sample.temperature=0" in settings(greedy, "decode")
    assert settings(greedy, "train") == settings(subject, "train")


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="lm finetune"):
        from_recipe(override(RECIPE, train={"base": "x"}), CACHE)
    huge = override(RECIPE, model={"d_ff": 1 << 22, "n_layers": 1000})
    with pytest.raises(ResourceError, match="loading .* needs about"):
        from_recipe(huge, CACHE).loaded(case("fp32"))


def test_the_memory_of_weights_is_that_of_their_files_unless_another_format_is_asked(
    tmp_path, tokenizer
):
    write_folder(tmp_path / "source", tokenizer)
    folder = imported(tmp_path / "source", tmp_path / "tiny")
    subject = from_checkpoint("tiny", folder, CACHE, "cpu")
    sizes = {}
    for dtype in ("auto", "fp32", "bf16", "int8", "int4"):
        case = Case(what="decode", model="tiny", dtype=dtype, threads=1)
        sizes[dtype] = subject._size(case)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert sizes["auto"] == stored >= sizes["fp32"] == 2 * sizes["bf16"]
    assert sizes["fp32"] / 4 < sizes["int8"] < sizes["bf16"] and sizes["int4"] < sizes["int8"]
