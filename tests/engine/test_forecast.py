"""What a run will take, against what it took; and what is refused, with the reason."""

from collections import namedtuple

import pytest

from engine import forecast as planning
from engine.cost import train_flops
from engine.errors import DataError, RecipeError, ResourceError
from engine.finetune.run import run as finetune
from engine.forecast import Forecast, best_parameters, forecast
from engine.recipe import load
from engine.rehearsal import Rehearsed
from engine.train.pretrain import run as pretrain
from engine.train.run import Finished, Prepared, Saved
from tests.conftest import ROOT
from tests.engine.finetune.bases import rows, write_base, write_rows

TINY = [f"data.train={ROOT / 'engine' / 'train'}", "data.seq_len=32", "tokenizer.vocab_size=400"]
TINY += ["model.d_model=16", "model.n_layers=2", "model.n_heads=2", "train.batch_size=4"]
TINY += ["train.schedule.warmup=2", "run.threads=1"]


def plan(folder, *given, checkpoints=None, finetune=False, measure=False, recipe=None) -> Forecast:
    made = recipe or load("", "test", [*TINY, *given])
    events = forecast(
        made, folder / "run", folder / "cache", folder, finetune=finetune, measure=measure
    )
    return list(events)[-1]


@pytest.fixture
def rehearsed(monkeypatch):
    """Steps that take as long as the test says."""

    def says(seconds: float) -> None:
        made = Rehearsed(seconds=[seconds], tokens=4 * 32, before=1, peak_memory=2)
        monkeypatch.setattr(planning, "rehearse", lambda *_: made)

    return says


def on_disk(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_pretraining_run_takes_what_was_planned(tmp_path):
    said = plan(tmp_path, "train.steps=6", "eval.bytes=500", "eval.final_bytes=500")
    recipe = load("", "test", [*TINY, "train.steps=6", "eval.bytes=500", "eval.final_bytes=500"])
    events = list(pretrain(recipe, tmp_path / "run", tmp_path / "cache"))
    prepared = next(event for event in events if isinstance(event, Prepared))
    finished = next(event for event in events if isinstance(event, Finished))
    saved = next(event for event in reversed(events) if isinstance(event, Saved))
    assert said.recipe.model == prepared.recipe.model
    assert sum(said.parameters.values()) == said.trained == prepared.parameters
    assert said.flops_per_token == prepared.flops_per_token
    assert said.flops == 6 * 4 * 32 * train_flops(prepared.recipe.model, 32)
    assert (said.steps, said.tokens) == (6, finished.tokens)
    assert said.checkpoint == pytest.approx(on_disk(saved.folder), rel=0.15)
    exact = plan(tmp_path, "train.steps=6").text
    assert said.text and exact and exact.how == "" and said.text.how
    assert said.text.tokens == pytest.approx(exact.tokens, rel=0.1)
    assert said.epochs == pytest.approx(said.tokens / said.text.tokens)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_finetuning_run_takes_what_was_planned(tmp_path, tokenizer, rank):
    base = write_base(tmp_path / "base", tokenizer)
    data = write_rows(tmp_path / "rows.jsonl", rows(40))
    given = [f"train.base={base}", f"data.train={data}", "data.seq_len=48", "train.steps=3"]
    given += ["train.batch_size=2", "data.chat=plain", f"train.lora.rank={rank}"]
    recipe = load("", "test", [*given, "train.replay=0", "train.schedule.warmup=1"])
    said = plan(tmp_path, recipe=recipe, finetune=True)
    events = list(finetune(recipe, tmp_path / "run", tmp_path / "cache", tmp_path))
    prepared = next(event for event in events if isinstance(event, Prepared))
    finished = next(event for event in events if isinstance(event, Finished))
    saved = next(event for event in reversed(events) if isinstance(event, Saved))
    assert said.recipe.model == prepared.recipe.model and said.tuned
    trained = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    assert said.trained == trained
    assert said.tokens == pytest.approx(finished.tokens, rel=0.2)  # packs differ in length
    assert said.checkpoint == pytest.approx(on_disk(saved.folder), rel=0.35)


def test_a_budget_holds_the_steps_that_were_measured(tmp_path, rehearsed):
    rehearsed(0.5)
    made = plan(tmp_path, "train.budget=60s", "eval.bytes=100", measure=True)
    assert made.steps and 110 < made.steps < 120
    assert made.seconds and made.scoring
    assert made.seconds == pytest.approx(0.5 * made.steps + made.scoring)
    assert plan(tmp_path, "train.steps=7", measure=True).steps == 7
    assert plan(tmp_path, "train.budget=60s").steps is None


def test_scoring_takes_a_third_of_the_flops_of_training(tmp_path, rehearsed):
    """Twice the text held out, or windows that overlap twice as much, take twice as long."""
    rehearsed(0.5)
    short = ["train.steps=20", "eval.bytes=1", "eval.final_bytes=1000"]
    one = plan(tmp_path, *short, "eval.overlap=1", measure=True)
    two = plan(tmp_path, *short, "eval.overlap=2", measure=True)
    assert one.scoring and two.scoring == pytest.approx(2 * one.scoring, rel=0.05)
    tokens = 1000 / one.text.bytes_per_token
    assert one.scoring == pytest.approx(tokens * 0.5 / (4 * 32) / 3, rel=0.05)


def refused(kind, tmp_path, match, *given, measure=False):
    with pytest.raises(kind, match=match):
        plan(tmp_path, *given, measure=measure)


def test_what_is_known_to_fail_is_refused(tmp_path, rehearsed, monkeypatch):
    refused(
        RecipeError, tmp_path, "longer than the run", "train.steps=5", "train.schedule.warmup=6"
    )
    assert plan(tmp_path, "train.steps=6", "train.schedule.warmup=6").notes
    refused(
        DataError,
        tmp_path,
        "too few for data.seq_len",
        "data.seq_len=100000",
        "model.max_seq_len=100000",
    )
    refused(RecipeError, tmp_path, "smaller than the tokenizer", "model.vocab_size=300")
    refused(RecipeError, tmp_path, "lm finetune", "train.lora.rank=4")
    refused(
        ResourceError, tmp_path, "this run needs about", "model.d_ff=4000000", "model.n_layers=64"
    )
    rehearsed(10.0)
    refused(
        RecipeError,
        tmp_path,
        r"budget=90s holds \d steps of 10 s",
        "train.budget=90s",
        measure=True,
    )
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage(1000))
    refused(ResourceError, tmp_path, "checkpoints take up to")


def test_what_is_only_unwise_is_noted(tmp_path):
    def notes(*given: str) -> str:
        return " | ".join(plan(tmp_path, "train.steps=10000", *given).notes)

    wise = ["tokenizer.vocab_size=300", "train.steps=2000", f"data.train={ROOT / 'engine'}"]
    whole = notes(*wise)
    assert whole == "", whole
    assert "is read" in notes() and "teaches less" in notes()
    assert "too large for the budget" in notes("train.steps=30")
    assert "small for the budget" in notes()
    assert "lower tokenizer.vocab_size" in notes("tokenizer.vocab_size=2000")
    assert "rows that no token uses" in notes("model.vocab_size=1000")
    assert "train.optim.lr=1 moves" in notes("train.optim.lr=1")
    assert "warm-up of 6 steps" in notes("train.steps=8", "train.schedule.warmup=6")


def test_the_best_size_is_that_of_the_paper():
    """Hoffmann et al., table 3: 1.21e20 FLOPs for 1e9 parameters, 5.76e23 for 67e9, within 15 %."""
    assert best_parameters(1.21e20, 6) == pytest.approx(1e9, rel=0.15)
    assert best_parameters(5.76e23, 6) == pytest.approx(67e9, rel=0.15)
