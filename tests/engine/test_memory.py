"""Memory by part: counted against a real model, and fitted against real runs in fresh processes."""

import json
import statistics
import subprocess
import sys

import pytest
import torch

from engine.config import LoraConfig, ModelConfig, OptimConfig, TrainConfig
from engine.memory import TORCH, needed_memory, training_memory
from engine.model.int8 import Int8Linear
from engine.model.lora import add_lora
from engine.recipe import load
from engine.rehearsal import rehearse
from engine.train.optim import Optimizers
from engine.train.precision import choose_precision
from engine.train.prepare import predict_memory
from tests.conftest import command_environment, make_model

SIZES = [
    {},
    {"tie_embeddings": True, "n_kv_heads": 2},
    {"activation": "gelu", "qk_norm": "none", "head_dim": 16},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("rank", [0, 3])
def test_weights_gradients_and_optimizer_are_counted_to_the_number(sizes, optimizer, rank):
    model = make_model(**sizes)
    lora = LoraConfig(rank=rank)
    if rank:
        add_lora(model, lora, torch.Generator())
    config = OptimConfig(name=optimizer)
    parts = training_memory(model.config, TrainConfig(optim=config, lora=lora), 2, 8)
    state = Optimizers(model, config).state()
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    remembered = sum(tensor.nbytes for tensor in state.values() if tensor.ndim)
    assert parts["optimizer"] == remembered


def test_a_base_in_8_bits_takes_a_quarter_and_a_scale_per_row():
    model = make_model()
    lora = LoraConfig(rank=2, base="int8")
    add_lora(model, lora, torch.Generator())
    parts = training_memory(model.config, TrainConfig(lora=lora), 2, 8)
    held = sum(p.nbytes for p in model.parameters())
    held += sum(m.weight.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    assert parts["weights"] == held


def test_what_blocks_keep_is_what_autograd_saves():
    """Every tensor saved for the backward pass of one more block, each storage once."""

    def saved(layers: int) -> int:
        model = make_model(n_layers=layers, d_model=64, n_kv_heads=2).train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            kept = model.hidden(torch.zeros(4, 100, dtype=torch.long))
        assert kept.requires_grad
        return sum(seen.values())

    config = make_model(d_model=64, n_kv_heads=2).config
    two, three = (
        training_memory(ModelConfig(**_sizes(config) | {"n_layers": n}), TrainConfig(), 4, 100)
        for n in (2, 3)
    )
    predicted = (three["activations"] - two["activations"]) / 1.6
    assert predicted == pytest.approx(saved(3) - saved(2), rel=0.1)


def _sizes(config: ModelConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_recomputing_less_at_once_and_fewer_tokens_take_less():
    config = ModelConfig(vocab_size=4096)
    whole = training_memory(config, TrainConfig(), 32, 256)
    assert needed_memory(whole) == sum(whole.values()) - TORCH
    again = training_memory(config, TrainConfig(recompute=True), 32, 256)
    assert again["activations"] < 0.75 * whole["activations"]
    parts = training_memory(config, TrainConfig(accumulate=8), 4, 256)
    assert parts["activations"] * 8 == pytest.approx(whole["activations"])
    small = training_memory(config, TrainConfig(loss_chunk=128), 32, 256)
    assert small["logits"] * 8 == whole["logits"]
    team = training_memory(config, TrainConfig(processes=2, accumulate=2), 16, 256)
    one = training_memory(config, TrainConfig(accumulate=2), 16, 256)
    assert team["weights"] == one["weights"] and team["activations"] == 2 * one["activations"]
    assert needed_memory(team) > sum(one.values())


# Name → what it differs in from a recipe of defaults.
SHAPES = {
    "0.2M": "d_model=64 n_layers=2 n_heads=2 vocab_size=512; 64 8",
    "1M adamw": "d_model=128 n_layers=4 n_heads=2 vocab_size=1024; 128 32 optim.name=adamw",
    "3M": "d_model=192 n_layers=4 n_heads=3 vocab_size=4096; 256 16",
    "3M in parts": "d_model=192 n_layers=4 n_heads=3 vocab_size=4096; 256 16 accumulate=4",
    "7M long": "d_model=256 n_layers=6 n_heads=4 vocab_size=4096; 1024 4",
    "7M recomputed": "d_model=256 n_layers=6 n_heads=4 vocab_size=4096; 1024 4 recompute=true",
    "17M": "d_model=384 n_layers=6 n_heads=6 d_ff=1024 vocab_size=8192; 256 16",
    "34M adamw": "d_model=512 n_layers=8 n_heads=8 vocab_size=8192; 256 8 optim.name=adamw",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_memory_of_steps_in_a_fresh_process(name, capsys, tmp_path):
    """Within 15 % of what was measured, but for the 50 MB that a whole run has over bare steps."""
    shape, _, rest = SHAPES[name].partition(";")
    length, rows, *others = rest.split()
    given = [f"model.{each}" for each in shape.split()] + [f"train.{each}" for each in others]
    recipe = load("", name, [*given, f"data.seq_len={length}", f"train.batch_size={rows}"])
    cpu, cache = torch.device("cpu"), tmp_path / "cache"
    precision = choose_precision(recipe.run, cpu, cache, finetune=False)
    measured = rehearse(recipe, tmp_path / "cache").peak_memory + 50_000_000
    predicted = sum(predict_memory(recipe, precision).values())
    with capsys.disabled():
        print(
            f"\n{name:14} measured {measured / 1e6:6.0f} MB, predicted {predicted / 1e6:6.0f} MB",
            end="",
        )
        print(f"  {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=0.15)


RUNS = {
    "0.2M": "smoke train.steps=40",
    "3M": "stdlib train.steps=12",
    "17M": "stdlib train.steps=8 model.d_model=384 model.n_layers=6 model.n_heads=6 "
    "model.d_ff=1024 tokenizer.vocab_size=8192",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_plan_is_kept(name, tmp_path, capsys):
    """Memory within 15 % and steps within 25 % of a whole run's, which has a process of its own."""
    short = [
        *RUNS[name].split(),
        "train.schedule.warmup=2",
        "eval.bytes=2000",
        "eval.final_bytes=2000",
    ]

    def run(command: str, *words: str) -> list[dict]:
        process = subprocess.run(
            [sys.executable, "-m", "cli.main", command, *short, *words, "--json", "-q"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=command_environment(tmp_path),
        )
        assert process.returncode == 0, process.stderr
        return [json.loads(line) for line in process.stdout.splitlines()]

    (before,), trained, (after,) = run("plan"), run("train"), run("plan")
    steps = [row["seconds"] for row in trained if row["schema"] == "lm/train/step/1"]
    took = statistics.median(steps[2:])
    said = (before["seconds_per_step"] + after["seconds_per_step"]) / 2
    memory, peak = before["memory"]["peak"], trained[-1]["peak_memory"]
    with capsys.disabled():
        print(f"\n{name:5} step {took:.3f} s, planned {said:.3f} s  {said / took - 1:+.1%}", end="")
        print(
            f"; peak {peak / 1e6:.0f} MB, planned {memory / 1e6:.0f} MB  {memory / peak - 1:+.1%}"
        )
    assert memory == pytest.approx(peak, rel=0.15)
    assert said == pytest.approx(took, rel=0.25)
