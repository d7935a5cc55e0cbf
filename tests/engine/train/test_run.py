"""A whole run: exact resume, and what each failure leaves behind."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine import checkpoint
from engine.errors import CheckpointError, DataError, DivergenceError, RecipeError, ResourceError
from engine.recipe import load
from engine.runs import TOKENIZER
from engine.text.tokenizer import load_tokenizer
from engine.train.log import read_metrics
from engine.train.loop import TrainStep
from engine.train.plan import Plan, Planner
from engine.train.pretrain import run
from engine.train.run import Evaluated, Finished, Interrupted, Prepared
from tests.conftest import ROOT
from tests.engine.text.published import llama3, qwen, write

# 900 windows of text and 24 steps of 48: the run crosses its first epoch after 18 steps.
RECIPE = """
data: {{train: "{data}", seq_len: 16, holdout: 10}}
tokenizer: {{vocab_size: 300}}
model: {{d_model: 32, n_layers: 1, n_heads: 2, max_seq_len: 32}}
train: {{steps: 24, batch_size: 48, accumulate: 4, dropout: 0.1, schedule: {{warmup: 4}}}}
eval: {{every: 7, bytes: 300, final_bytes: 300, overlap: 1, save_every: "5"}}
run: {{threads: 1}}
"""
DATA = ROOT / "engine" / "train" / "[bgs]*.py"  # a corpus of some twenty steps


def recipe(*overrides: str, data: object = DATA):
    return load(RECIPE.format(data=data), "test", overrides)


def train(tmp_path: Path, name: str, *overrides: str, until: int | None = None, **options):
    """Run to the end, or abandon the run after some steps as a crash would; return its events."""
    events = []
    stream = run(recipe(*overrides), tmp_path / name, tmp_path / "cache", **options)
    for event in stream:
        events.append(event)
        if isinstance(event, TrainStep) and event.step == until:
            break
    return events


def outcome(folder: Path) -> tuple:
    """All that must be equal to the bit: weights, optimizer, every logged figure but the clock."""
    files = ("model.safetensors", "state/optimizer.safetensors")
    rows = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return (*((folder / "last" / file).read_bytes() for file in files), rows)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stopped", [3, 13, 21])
def test_resume_is_the_run_that_never_stopped(tmp_path, optimizer, stopped):
    """Before the first save, mid-way, and in the second epoch; with accumulation and dropout."""
    name = f"train.optim.name={optimizer}"
    whole = train(tmp_path, "whole", name)
    prepared = next(event for event in whole if isinstance(event, Prepared))
    windows = prepared.objective.data.shards.train.tokens // 16
    assert windows < 20 * 48, "the run must cross an epoch"
    train(tmp_path, "stopped", name, until=stopped)
    train(tmp_path, "stopped", name, resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    assert len(outcome(tmp_path / "whole")[2]) == 24 + 4 + 1


def test_a_plan_that_bends_the_fall_is_resumed_too(tmp_path, monkeypatch):
    """From before it and from after it; the rate goes on from where it was."""
    plans = [Plan(at=4, steps=24, seconds_per_step=1)]
    plans += [Plan(at=14, steps=19, seconds_per_step=2, bends=True)]

    class Written(Planner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.plans = plans

    monkeypatch.setattr("engine.train.run.Planner", Written)
    given = ["train.steps=0", "data.seq_len=8", "train.batch_size=8"]
    train(tmp_path, "whole", *given)
    for stopped in (13, 17):
        train(tmp_path, f"stopped{stopped}", *given, until=stopped)
        train(tmp_path, f"stopped{stopped}", *given, resume=True)
        assert outcome(tmp_path / f"stopped{stopped}") == outcome(tmp_path / "whole")
    rates = [row["lr"] for row in outcome(tmp_path / "whole")[2] if "lr" in row]
    assert rates[11:] == pytest.approx([1, 1, *(twelfth / 12 for twelfth in (11, 10, 8, 6, 4, 2))])


@pytest.mark.parametrize("lost", ["momentum", "position", "random"])
def test_the_comparison_would_notice_what_is_lost(tmp_path, lost, monkeypatch):
    """Controls that must fail: the same comparison, with one part of the state thrown away."""
    train(tmp_path, "whole")
    train(tmp_path, "stopped", until=13)
    last = (tmp_path / "stopped" / "last").resolve()
    if lost == "momentum":
        file = last / "state" / "optimizer.safetensors"
        state = {k: torch.zeros_like(v) for k, v in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(state, file)
    elif lost == "position":
        import engine.train.pretrain as module

        real = module.WindowBatches
        monkeypatch.setattr(
            module,
            "WindowBatches",
            lambda *options: lambda k, real=real(*options): real(k + 1),
        )
    else:
        import engine.train.gradient as module

        monkeypatch.setattr(module, "hash_seed", lambda *numbers: 0)
    forget_hashes(last)
    train(tmp_path, "stopped", resume=True)
    assert outcome(tmp_path / "stopped")[0] != outcome(tmp_path / "whole")[0]


def forget_hashes(folder: Path) -> None:
    """Let a deliberately changed checkpoint pass verification."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"recipe.yaml": manifest["files"]["recipe.yaml"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_stopping_saves_and_resuming_goes_on_exactly(tmp_path):
    train(tmp_path, "whole")
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count == 9

    events = train(tmp_path, "stopped", stop=stop)
    assert isinstance(events[-1], Interrupted) and events[-1].step == 9
    train(tmp_path, "stopped", resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_the_first_loss_is_ln_v_and_the_model_beats_the_unigram(tmp_path):
    """A learning test against a dumb baseline: 120 steps must beat byte frequencies."""
    from math import log

    from engine.train.baselines import baselines

    events = train(tmp_path, "run", "train.steps=120", "eval.final_bytes=3000")
    steps = [event for event in events if isinstance(event, TrainStep)]
    assert steps[0].loss == pytest.approx(log(300), abs=0.05)
    finished = events[-1]
    assert isinstance(finished, Finished)
    data = next(event for event in events if isinstance(event, Prepared)).objective.data
    dumb = next(baselines(data.shards, data.tokenizer, finished.score.bytes)).bits_per_byte
    assert finished.score.bits_per_byte < dumb - 0.5


def test_a_budget_is_planned_and_kept(tmp_path):
    events = train(tmp_path, "run", "train.steps=0", "train.budget=4s", "eval.save_every=60s")
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.seconds < 6, finished.seconds
    assert finished.step > 24
    plans = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plans[-1]["steps"] == finished.step


def test_best_and_last_are_kept_and_nothing_else(tmp_path):
    train(tmp_path, "run")
    folder = tmp_path / "run"
    kept = {path.name for path in folder.glob("step-*")}
    assert kept == {(folder / link).resolve().name for link in ("best", "last")}
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "valid_bpb" in r]
    lowest = min((r for r in rows if not r["final"]), key=lambda r: r["valid_bpb"])
    assert (folder / "best").resolve().name == f"step-{lowest['step']:06d}"


@pytest.mark.parametrize("lr", ["1e18", "1e30"])
def test_a_divergence_keeps_the_last_good_state(tmp_path, lr):
    """Whether the weights of the bad step are finite or not, `last` holds finite ones."""
    with pytest.raises(DivergenceError, match=r"run/last holds step \d+"):
        train(
            tmp_path,
            "run",
            "model.qk_norm=none",
            "train.schedule.warmup=20",
            f"train.optim.lr={lr}",
            f"train.optim.head_lr={lr}",
            "eval.every=1",
        )
    model, _ = checkpoint.load_model(tmp_path / "run" / "last")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_run_is_not_overwritten(tmp_path):
    train(tmp_path, "run", until=2)
    with pytest.raises(RecipeError, match="--resume"):
        train(tmp_path, "run")


@pytest.mark.parametrize("options", [{}, {"force": True}])
def test_files_of_the_user_are_not_taken_for_a_run(tmp_path, options):
    """`lm train exp/recipe.yaml -o exp` once replaced the recipe it was given."""
    theirs = {"recipe.yaml": "# mine\nrun: {seed: 3}\n"} | dict.fromkeys(TOKENIZER, "{}")
    for name, text in theirs.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(RecipeError, match="would be lost"):
            train(tmp_path, folder.name, until=1, **options)
        assert (folder / name).read_text() == text


def test_a_run_keeps_the_settings_of_its_tokenizer(tmp_path):
    """Which token ends a document may stand beside tokenizer.json only; resuming must find it."""
    published = write(tmp_path, llama3(), eos_token="<|end_of_text|>", chat_template="{{ x }}")
    path = f"tokenizer.path={published}"
    for resume in (False, True):
        events = train(tmp_path, "run", path, until=6 if not resume else None, resume=resume)
        prepared = next(event for event in events if isinstance(event, Prepared))
        tokenizer = prepared.tokenizer
        assert tokenizer.special[tokenizer.end_of_text] == "<|end_of_text|>"
        assert tokenizer.end_of_text in prepared.objective.data.shards.tokens("train")
    assert load_tokenizer(tmp_path / "run" / "last").template == "{{ x }}"


def test_another_end_of_text_makes_other_shards(tmp_path):
    """The definition of the tokenizer is the same; a cache that went by it alone would be wrong."""
    ends = {}
    for name in ("<|end_of_text|>", "<|eot_id|>"):
        folder = write(tmp_path, llama3(), eos_token=name)
        events = train(tmp_path, name.strip("<|>"), f"tokenizer.path={folder}", until=1)
        prepared = next(event for event in events if isinstance(event, Prepared))
        ends[name] = int(prepared.objective.data.shards.tokens("train")[-1])
        assert prepared.tokenizer.special[ends[name]] == name


def test_a_tokenizer_that_alters_text_is_refused(tmp_path):
    folder = write(tmp_path, qwen(), eos_token="<|endoftext|>")
    with pytest.raises(CheckpointError, match="the tokenizer normalizes text, so"):
        train(tmp_path, "run", f"tokenizer.path={folder}")


def test_a_failed_start_is_replaced(tmp_path):
    with pytest.raises(DataError):
        train(tmp_path, "run", "data.train=/nowhere")
    assert train(tmp_path, "run", until=1)


def test_resuming_another_recipe_is_refused_with_the_difference(tmp_path):
    train(tmp_path, "run", until=6)
    with pytest.raises(RecipeError, match=r"train\.optim\.lr was 0\.015, is 0\.5"):
        train(tmp_path, "run", "train.optim.lr=0.5", resume=True)


def test_resuming_on_other_text_is_refused(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(30):
        (texts / f"{index}.txt").write_text(f"{index} lines of text\n" * 200)
    source = f"data.train={texts}"
    train(tmp_path, "run", source, until=6)
    (texts / "3.txt").write_text("changed\n" * 300)
    with pytest.raises(RecipeError, match="not what this run was started on"):
        train(tmp_path, "run", source, resume=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(RecipeError, match="no run to resume"):
        train(tmp_path, "run", resume=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train(tmp_path, "run", until=6)
    file = tmp_path / "run" / "last" / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-10])
    elif damage == "flipped":
        data[-5] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        train(tmp_path, "run", resume=True)


def test_a_failed_save_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    """The disk fills while the second checkpoint is being written."""
    import errno

    import engine.manifest as module

    real, calls = module.flush, 0

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(module, "flush", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        train(tmp_path, "run")
    folder = tmp_path / "run"
    checkpoint.read_manifest(folder / "last")
    assert not list(folder.glob(".step-*"))


def test_too_little_text_is_said(tmp_path):
    (tmp_path / "tiny.txt").write_text("hello\n")
    with pytest.raises(DataError):
        list(run(recipe(data=tmp_path / "tiny.txt"), tmp_path / "run", tmp_path / "cache"))


def test_evaluations_come_when_the_recipe_says(tmp_path):
    events = train(tmp_path, "run")
    assert [e.step for e in events if isinstance(e, Evaluated) and not e.final] == [7, 14, 21, 24]
