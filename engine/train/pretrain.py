"""`lm train`: learn text from nothing. The objective is the next token of a corpus.

From here the run goes on in `engine/train/run.py`; what comes before the first step is in
`engine/train/prepare.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.config import Recipe
from engine.data.batches import WindowBatches
from engine.hardware import keep_heap, pick_device, use_threads
from engine.model.transformer import Transformer
from engine.runs import hold
from engine.train.evaluate import Score, score
from engine.train.gradient import Batches, Loss
from engine.train.job import Job
from engine.train.loss import next_token_loss
from engine.train.prepare import (
    Data,
    build_model,
    check_settings,
    fill_vocabulary,
    open_folder,
    prepare_data,
    ready_precision,
)
from engine.train.run import Event, go
from engine.train.team import check_processes


def run(
    recipe: Recipe,
    folder: Path,
    cache: Path,
    *,
    resume: bool = False,
    force: bool = False,
    stdin: BinaryIO | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train what `recipe` describes into `folder`, or continue or replace what is there.

    `stdin` is where text comes from if data.train is "-"; the run keeps a copy to resume from.

    Raises: RecipeError if the folder holds a run and neither `resume` nor `force` is set, or holds
    another run than the recipe describes; DataError, CheckpointError, and what `go` raises.
    """
    check_settings(recipe)
    keep_heap()
    threads = use_threads(recipe.run.threads)
    device = pick_device(recipe.run.device)
    check_processes(recipe, device)
    precision = yield from ready_precision(recipe, device, cache, finetune=False)
    with hold(folder):
        saved = open_folder(recipe, folder, resume, force)
        data = yield from prepare_data(recipe, folder, cache, stdin)
        recipe = fill_vocabulary(recipe, data.tokenizer.vocab_size)
        objective = Pretraining(recipe, data)
        model, optimizer = build_model(recipe, device, precision, saved)
        job = Job(
            recipe=recipe,
            folder=folder,
            objective=objective,
            model=model,
            tokenizer=data.tokenizer,
            optimizer=optimizer,
            saved=saved,
            device=device,
            precision=precision,
            threads=threads,
        )
        yield from go(job, stop)


class Pretraining:
    """Predict every token of random windows; judged in bits per byte of text held out."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        """Learn `data` as the recipe says. Raises: DataError if there is too little."""
        self.recipe, self.data = recipe, data
        self.digest = data.shards.digest
        self.context = recipe.eval.seq_len or recipe.data.seq_len
        self.valid: np.ndarray = data.shards.tokens("valid")
        train = recipe.train
        self.batches: Batches = WindowBatches(
            data.shards.tokens("train"),
            recipe.data.seq_len,
            train.batch_size,
            recipe.run.seed,
            train.accumulate,
        )
        self.loss: Loss = partial(
            next_token_loss, chunk=train.loss_chunk, recompute=train.recompute
        )

    def evaluate(self, model: Transformer) -> Score:
        """Score the beginning of every held-out document."""
        most = self.recipe.eval.bytes
        share = min(1.0, most / self.data.shards.valid.bytes)
        return self._score(model, self.context, most, share)

    def judge(self, model: Transformer) -> Score:
        """Score the held-out text with overlapping windows."""
        settings = self.recipe.eval
        return self._score(model, max(1, self.context // settings.overlap), settings.final_bytes)

    def _score(self, model: Transformer, stride: int, max_bytes: int, share: float = 1.0) -> Score:
        return score(
            model,
            self.data.tokenizer,
            self.valid,
            context=self.context,
            stride=stride,
            max_bytes=max_bytes,
            share=share,
        )

    def lineage(self) -> Mapping[str, Any]:
        """Name the corpus and its sizes."""
        shards = self.data.shards
        data = {"source": self.recipe.data.train, "digest": shards.digest, "held_out": shards.rule}
        sizes = {"train": dataclasses.asdict(shards.train)}
        sizes |= {"valid": dataclasses.asdict(shards.valid)}
        return {"parent": None, "data": data | sizes}
