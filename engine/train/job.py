"""What a run is made of before its first step: what it learns, with what, on what.

`pretrain.py` makes an `Objective` of a corpus, `engine/finetune` one of questions and answers. Next
on the arrow: `engine/train/run.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.config import Recipe
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer
from engine.train.evaluate import Score
from engine.train.gradient import Batches, Loss
from engine.train.optim import Optimizers
from engine.train.precision import Precision
from engine.train.prepare import SavedRun


class Objective(Protocol):
    """What a run learns and is judged by: where pretraining and finetuning differ."""

    @property
    def digest(self) -> str:
        """A fingerprint of everything it learns from; a resumed run must find the same."""
        ...

    @property
    def batches(self) -> Batches:
        """Returns the parts of batch k; can be pickled, to be called in several processes."""
        ...

    @property
    def loss(self) -> Loss:
        """Returns (sum of nats, count of targets) of one part; can be pickled too."""
        ...

    def evaluate(self, model: Transformer) -> Score:
        """Score the model on the way: a quick look at what is held out."""
        ...

    def judge(self, model: Transformer) -> Score:
        """Score what is delivered, thoroughly."""
        ...

    def lineage(self) -> Mapping[str, Any]:
        """Say for the manifest what was learned from: at least `parent` and `data`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that the first step needs."""

    recipe: Recipe  # with every size filled in
    folder: Path
    objective: Objective
    model: Transformer
    tokenizer: Tokenizer
    optimizer: Optimizers
    saved: SavedRun | None  # where to go on from
    device: torch.device
    precision: Precision
    threads: int
    base: Path | None = None  # what a model with LoRA stands beside
    kept: Mapping[str, Any] = field(default_factory=dict)  # what preparing it again will need
    first_look: bool = False  # evaluate before the first step too
