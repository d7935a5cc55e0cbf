"""A whole finetuning run: exact resume of all weights and of LoRA, and what it tells at the end."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine import checkpoint
from engine.errors import DataError, RecipeError
from engine.finetune.run import Compared, Probed, run
from engine.recipe import load
from engine.train.log import read_metrics
from engine.train.loop import TrainStep
from engine.train.run import Evaluated, Finished, Interrupted, Prepared
from tests.engine.finetune.bases import rows, write_base, write_rows

RECIPE = """
data: {{train: {data}, seq_len: 96, holdout: 10}}
train:
  {{base: {base}, steps: 20, batch_size: 4, accumulate: 2, dropout: 0.1, schedule: {{warmup: 4}},
  optim: {{name: adamw, lr: 0.01, embed_lr: 0.01, head_lr: 0.01, eps: 1.0e-8}}}}
eval: {{every: 7, bytes: 300, final_bytes: 3000, save_every: "5"}}
run: {{threads: 1}}
"""
LORA = ("train.lora.rank=4", "train.lora.dropout=0.1")
KINDS = {"full": (), "lora": LORA, "int8": (*LORA, "train.lora.base=int8")}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture
def tune(tmp_path, base):
    """Run to the end, or abandon the run after some steps as a crash would; return its events."""
    data = write_rows(tmp_path / "rows.jsonl", rows(60))

    def tune(name: str, *overrides: str, until: int | None = None, **options):
        recipe = load(RECIPE.format(data=data, base=base), "test", overrides)
        events = []
        for event in run(recipe, tmp_path / name, tmp_path / "cache", tmp_path, **options):
            events.append(event)
            if isinstance(event, TrainStep) and event.step == until:
                break
        return events

    return tune


def pick(kind: type, events: list) -> list:
    return [event for event in events if isinstance(event, kind)]


def outcome(folder: Path) -> tuple:
    """All that must be equal to the bit: weights, optimizer, every logged figure but the clock."""
    weights = sorted((folder / "last").glob("*model.safetensors"))
    files = [*weights, folder / "last" / "state" / "optimizer.safetensors"]
    logged = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return [file.read_bytes() for file in files], logged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped", [3, 16])
def test_resume_is_the_run_that_never_stopped(tmp_path, tune, kind, stopped):
    """Before the first save and in the second epoch; packed, with accumulation and dropout."""
    whole = tune("whole", *KINDS[kind])
    (prepared,) = pick(Prepared, whole)
    assert len(prepared.objective.packs.bins) < 20 * 4 // 2, "the run must cross an epoch"
    tune("stopped", *KINDS[kind], until=stopped)
    tune("stopped", *KINDS[kind], resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    losses = [event.loss for event in pick(TrainStep, whole)]
    assert len(losses) == 20 and losses[-1] < losses[0]


@pytest.mark.parametrize("lost", ["moments", "position", "adapter"])
def test_the_comparison_would_notice_what_is_lost(tmp_path, tune, lost, monkeypatch):
    """Controls that must fail: the same comparison, with one part of the state thrown away."""
    tune("whole", *LORA)
    tune("stopped", *LORA, until=13)
    last = (tmp_path / "stopped" / "last").resolve()
    file = last / ("adapter_model" if lost == "adapter" else "state/optimizer")
    file = file.with_suffix(".safetensors")
    if lost == "position":
        import engine.finetune.objective as module

        real = module.SampleBatches.__call__
        monkeypatch.setattr(module.SampleBatches, "__call__", lambda s, k: real(s, k + 1))
    else:
        state = {k: torch.zeros_like(v) for k, v in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(state, file)
        manifest = json.loads((last / "manifest.json").read_text())
        manifest["files"] = {"recipe.yaml": manifest["files"]["recipe.yaml"]}
        (last / "manifest.json").write_text(json.dumps(manifest))
    tune("stopped", *LORA, resume=True)
    assert outcome(tmp_path / "stopped")[0] != outcome(tmp_path / "whole")[0]


def test_a_stop_saves_and_says_where(tmp_path, tune):
    asked = iter([False] * 6 + [True] * 99)
    events = tune("stopped", stop=lambda: next(asked))
    (stopped,) = pick(Interrupted, events)
    assert stopped.step == 7 and (tmp_path / "stopped" / "last").exists()


def test_other_rows_or_another_base_are_not_resumed(tmp_path, tune, tokenizer):
    tune("run", until=8)
    write_rows(tmp_path / "rows.jsonl", rows(61))
    with pytest.raises(RecipeError, match="is not what this run was started on"):
        tune("run", resume=True)
    write_rows(tmp_path / "rows.jsonl", rows(60))
    other = write_base(tmp_path / "other", tokenizer, n_layers=1)
    with pytest.raises(RecipeError, match="train.base was"):
        tune("run", f"train.base={other}", resume=True)


def test_the_base_is_not_touched_and_the_tuned_model_answers(tmp_path, tune, base):
    """Ten rows learned by heart: the model says them, its base does not; the base's files stay."""
    before = (base / "model.safetensors").read_bytes()
    few = (
        "train.steps=150",
        "data.holdout=2",
        "eval.answers=20",
        "train.dropout=0",
        "eval.every=50",
    )
    write_rows(tmp_path / "rows.jsonl", rows(10) * 3)
    events = tune("run", *few, f"data.valid={tmp_path / 'rows.jsonl'}", "data.chat=plain")
    assert (base / "model.safetensors").read_bytes() == before
    (compared,) = pick(Compared, events)
    (asked,) = compared.answers
    everything = asked.before[-1], asked.after[-1]
    assert everything[0].right == 0 and everything[1].share > 0.9
    scores = pick(Evaluated, events)
    assert scores[0].step == 0 and scores[-1].score.loss < 0.1 < scores[0].score.loss
    (finished,) = pick(Finished, events)
    model, _ = checkpoint.load_model(finished.folder / "best")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            model.parameters(), checkpoint.load_model(base)[0].parameters(), strict=True
        )
    )


def test_forgetting_is_measured_on_what_the_base_learned(tune):
    """The base says it was trained on pydoc; tuning hard on fruit makes it worse there."""
    texts = {}
    for name, more in {"hard": ("train.optim.lr=0.05",), "none": ("train.optim.lr=1e-9",)}.items():
        still = ("train.optim.embed_lr=1e-9", "train.optim.head_lr=1e-9") if name == "none" else ()
        (compared,) = pick(Compared, tune(name, *more, *still, "eval.bytes=4000"))
        (texts[name],) = compared.texts
    assert texts["hard"].low > 0.05 and texts["hard"].difference > 0.1
    assert abs(texts["none"].difference) < 1e-4
    assert texts["hard"].before == texts["none"].before


def test_replay_mixes_in_the_share_of_tokens_it_names(tune):
    (prepared,) = pick(Prepared, tune("run", "train.replay=0.5", until=1))
    objective = prepared.objective
    learned = replayed = 0
    for step in range(30):
        for part in objective.batches(step):
            if part.lengths:
                learned += part.tokens_BT.numel()
            else:
                replayed += part.tokens_BT.numel()
    assert replayed / (replayed + learned) == pytest.approx(0.5, abs=0.1)


def test_the_longest_batch_comes_first(tune):
    events = tune("run", until=1)
    (probed,) = pick(Probed, events)
    (prepared,) = pick(Prepared, events)
    batches = [prepared.objective.batches(step) for step in range(40)]
    longest = max(part.tokens_BT.numel() for parts in batches for part in parts)
    assert longest <= probed.tokens <= 2 * 96  # two packs at a time
    assert all(parameter.grad is None for parameter in prepared.model.parameters())


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        (("train.base=",), RecipeError, "which model is to be finetuned"),
        (("data.format=jsonl",), RecipeError, "is a kind of file"),
        (("model.d_model=64",), RecipeError, "comes from the base"),
        (("tokenizer.vocab_size=300",), RecipeError, "comes from the base"),
        (("data.seq_len=999",), RecipeError, "the base reads 128 tokens"),
        (("data.replay=nosuch.txt",), DataError, "nosuch.txt"),
    ],
)
def test_what_cannot_be_followed_is_refused(tune, overrides, error, message):
    with pytest.raises(error, match=message):
        tune("run", *overrides)


def test_force_destroys_neither_the_base_nor_a_run_for_a_typo(tmp_path, tune, base):
    """Regression: --force used to empty the folder before base and rows were looked at."""
    weights = (base / "model.safetensors").read_bytes()
    data = tmp_path / "rows.jsonl"
    for folder in (base.parent, base, base / "inside"):
        recipe = load(RECIPE.format(data=data, base=base.parent), "test")
        with pytest.raises(RecipeError, match="holds the base"):
            list(run(recipe, folder, tmp_path / "cache", tmp_path, force=True))
    assert (base / "model.safetensors").read_bytes() == weights
    tune("run", "train.steps=3")
    with pytest.raises(DataError, match="no such file"):
        tune("run", "data.train=nosuch.jsonl", force=True)
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    tune("run", "train.steps=2", force=True)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_an_adapter_is_no_base(tmp_path, tune):
    """Regression: training all weights of one failed at its first save."""
    tune("adapter", *LORA, "train.steps=2")
    for more in ((), LORA):
        with pytest.raises(RecipeError, match="is an adapter; merge it first"):
            tune("next", f"train.base={tmp_path / 'adapter'}", *more)


def test_one_text_gives_up_its_end(tmp_path, tune):
    (tmp_path / "one.txt").write_text("".join(f"Line {n} of a long text.\n" for n in range(400)))
    text = (f"data.train={tmp_path / 'one.txt'}", "data.overlong=split", "train.steps=2")
    (prepared,) = pick(Prepared, tune("run", *text))
    tuning = prepared.objective.tuning
    assert tuning.rule == "the last 1/10 of the one text"
    held, every = len(tuning.valid.samples), len(tuning.valid.samples) + len(tuning.train.samples)
    assert held == round(every / 10) > 1
    for side in (tuning.train, tuning.valid):
        assert side.tally.tokens == sum(len(sample.ids) for sample in side.samples)
    with pytest.raises(RecipeError, match="which rows"):
        tune("other", "data.train=stdlib")


def test_answers_in_a_chat_template_are_asked_too(tmp_path, tune):
    """Regression: the line end that ChatML writes after an answer made it no question."""
    events = tune("run", "train.steps=2", "eval.answers=3", "data.chat=auto")
    (compared,) = pick(Compared, events)
    (prepared,) = pick(Prepared, events)
    assert prepared.tokenizer.template and compared.answers[0].after[-1].n == 3
